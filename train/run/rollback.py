"""Back to a whole checkpoint, and past the rows of the steps since: what `on_nonfinite: rollback` does."""

from functools import partial
from typing import Any

import jax
from etils import epath

from mixtral_jax.train import checkpoints
from mixtral_jax.train.checkpoints import Found, Say
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.hooks import Diverged
from mixtral_jax.train.meetings import meet
from mixtral_jax.train.run.fork import restored
from mixtral_jax.train.state import TrainState


def roll_back(
    config: RunConfig, directory: epath.PathLike, error: Diverged, next_row: int, passed: list[dict[str, int]],
    state: TrainState, say: Say, first: Found | None = None,
) -> tuple[Found, TrainState] | str:  # fmt: skip
    """The checkpoint to resume from and what it holds, placed as `state`, which makes room; or why there is none.

    It is the newest multiple of checkpoint.every, wherever signals and clocks have made others; without one, the newest
    of all, and before a run has one of its own the one that it began with (`first`). Its position is `next_row`, the
    first behind the bad step. `passed` lists the times before: every later checkpoint holds them. A killed run comes to
    the same step with the same rows and goes back once more, until a checkpoint behind it says where the rows go on: to
    the same one, as long as that is kept.
    """
    if config.on_nonfinite != "rollback" or error.finite:
        return ""
    if len(passed) >= config.max_rollbacks:
        return f"the run went back {len(passed)} times already (max_rollbacks)"
    meet("rollback")  # what process 0 removes is gone, and what it saved is whole
    found = checkpoints.find_together(directory, "auto", say, config.checkpoint.every)
    found = first if found is None and first is not None and first.trunk else found
    if found is None or found.step >= error.step:
        return "on_nonfinite has nothing to go back to"
    now = [*passed, {"after_step": found.step, "bad_step": error.step, "next_row": next_row}]
    say(f"{error}: back to {found.name}, then row {next_row} (time {len(now)} of {config.max_rollbacks})")

    def give_up(x: jax.Array) -> Any:
        abstract = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        x.delete()
        return abstract

    found = found._replace(dataset={**found.dataset, "passed": now})
    what, abstract = f"{found.name} could not be read", jax.tree.map(give_up, state)
    return found, checkpoints.patiently(what, partial(restored, found, abstract), say, alone=False)
