"""Which step is saved when, and which one is resumed from."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import optax
from etils import epath
from pydantic import Field

from mixtral_jax import checkpoint
from mixtral_jax.config import FrozenConfig
from mixtral_jax.train.checkpoints.best import LINK, point_to
from mixtral_jax.train.errors import UserError, is_of_the_system
from mixtral_jax.train.state import TrainState

Say = Callable[[str], None]


class CheckpointConfig(FrozenConfig):
    """When the run is saved and what is kept; the last step is always saved."""

    every: int | None = Field(200, gt=0, description="steps between checkpoints; null: only the last step")
    keep_last: int = Field(2, gt=0, description="how many of the newest checkpoints are kept")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints at multiples of this many steps are kept for ever"
    )
    directory: str | None = Field(
        None, description="where checkpoints go, gs:// too; null: <output_dir>/<run_name>/checkpoints"
    )
    asynchronous: bool = Field(True, description="write in the background while training goes on")


class Found(NamedTuple):
    """A checkpoint to resume from."""

    step: int
    path: epath.Path
    dataset: dict[str, Any]  # next_row, fingerprint, tokens
    meta: dict[str, Any]  # step, config, finished


class Saved(NamedTuple):
    """A checkpoint that is complete on disk."""

    step: int
    bytes: int
    seconds: float


class Checkpointer:
    """Saves in the background, one at a time, and prunes what is not kept. Directory: <step>/{state,dataset,meta}."""

    def __init__(self, config: CheckpointConfig, directory: epath.PathLike, newest: int | None = None):
        """`newest` is a step whose checkpoint is whole: it is not saved again."""
        self._config = config
        self.directory = epath.Path(directory)
        self._newest = newest
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[Saved] | None = None

    def due(self, step: int, last: bool) -> bool:
        """Is a checkpoint to be made after `step` updates?"""
        return last or (self._config.every is not None and step % self._config.every == 0)

    def save(
        self, state: TrainState, step: int, dataset: Mapping[str, Any], meta: Mapping[str, Any], best: int | None = None
    ) -> Saved | None:
        """Start to save; the state may be donated as soon as this returns. Returns the save before, if one ended.

        `best` is the step that <directory>/best stands for once this one is whole, and that is never pruned.

        Raises:
            OSError: this one, or the one before, could not be written. Complete checkpoints are untouched.
        """
        before = self.wait()
        if step == self._newest:
            return before
        started = time.perf_counter()
        path = self.directory / str(step)
        if jax.process_index() == 0:
            path.rmtree(missing_ok=True)  # one that was passed over as broken when this run resumed
        pending = checkpoint.save_async(path, state, {"dataset": dataset, "meta": meta})
        self._newest = step

        def finish() -> Saved:
            saved = Saved(step, bytes=pending.result(), seconds=time.perf_counter() - started)
            self._prune(best)
            return saved

        self._under_way = self._thread.submit(finish)
        return before if self._config.asynchronous else self.wait()

    def wait(self) -> Saved | None:
        """Until nothing is being written. The finished save that was not reported yet, if any.

        Raises:
            OSError: it could not be written.
        """
        if self._under_way is None:
            return None
        try:
            return self._under_way.result()
        except Exception:
            self._newest = None  # it may be tried again
            raise
        finally:
            if self._under_way.done():  # else it was the waiting that was interrupted
                self._under_way = None

    def _prune(self, best: int | None) -> None:
        """Keep the best checkpoint, the newest `keep_last` whole ones and every multiple of `keep_every`."""
        if jax.process_index() != 0:
            return
        if best is None:  # of a run that watched something before
            best = best_step(self.directory)
        elif best != best_step(self.directory):
            point_to(self.directory, best)
        old, every = saved_steps(self.directory)[: -self._config.keep_last], self._config.keep_every
        discard(self.directory, [step for step in old if step != best and (every is None or step % every)])


def saved_steps(directory: epath.PathLike) -> list[int]:
    """Steps with a directory, whole or not, in order."""
    root = epath.Path(directory)
    if not root.exists():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def best_step(directory: epath.PathLike) -> int | None:
    """The step that <directory>/best stands for, if it is there."""
    link = epath.Path(directory) / LINK
    if "://" not in str(directory):
        return int(os.readlink(link)) if os.path.islink(link) else None
    return int(link.read_text()) if link.exists() else None


def find(directory: epath.PathLike, resume: Literal["auto", "never", "must"] | int, say: Say) -> Found | None:
    """The checkpoint that `resume` asks for; None: begin anew. Broken ones are named to `say` and passed over.

    Raises:
        UserError: the step asked for, or with `must` any, is not there whole; or checkpoints exist and none is whole.
    """
    root = epath.Path(directory)
    if resume == "never":
        return None
    steps = saved_steps(root)
    if isinstance(resume, int):
        if resume not in steps:
            raise UserError(
                f"resume: {resume}: {root} has no such checkpoint; it has {', '.join(map(str, steps)) or 'none'}"
            )
        steps = [resume]
    broken: list[str] = []
    for step in reversed(steps):
        problem = checkpoint.damage(root / str(step))
        try:
            if problem is None:
                items = {name: checkpoint.read_item(root / str(step), name) for name in ("dataset", "meta")}
                if broken:
                    say(f"{'; '.join(broken)}: using checkpoint {step} instead")
                return Found(step, root / str(step), items["dataset"], items["meta"])
        except Exception as error:  # whatever Orbax makes of a broken file
            if is_of_the_system(error):
                raise  # nothing is wrong with the checkpoint
            problem = f"it cannot be read ({type(error).__name__})"
        broken.append(f"checkpoint {step} is not whole ({problem})")
    if broken:
        raise UserError(f"{root}: {'; '.join(broken)}; none is whole. Start anew with resume=never and --force")
    if resume == "must":
        raise UserError(f"resume: must, but {root} holds no checkpoint")
    return None


def restore_state(found: Found, abstract: TrainState, changed: Sequence[str] = ()) -> TrainState:
    """The state, placed as `abstract` says, on any mesh.

    Args:
        changed: `a.b: old -> new` of the settings that may be to blame where it does not fit.

    Raises:
        UserError: a leaf has another shape than the model; it is named, and so is what changed.
    """
    try:
        return checkpoint.restore(found.path, abstract)
    except (ValueError, KeyError, TypeError) as error:
        if is_of_the_system(error):
            raise
        if (state := _restore_with_factor(found, abstract)) is not None:
            return state
        detail = str(error).partition("\n")[0][:300]  # Orbax shows whole trees
        if changed:
            detail += f"; changed since then: {', '.join(changed)}: set it back, or choose another run_name"
        raise UserError(f"checkpoint {found.step} does not fit: {detail}") from error


def _restore_with_factor(found: Found, abstract: TrainState) -> TrainState | None:
    """A state of before 2026-11-29, when the factor on the router's updates was a part of optax's chain."""
    moments: Any = (*abstract.optimizer.moments, optax.MaskedState(optax.EmptyState()))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        state = checkpoint.restore(
            found.path, abstract._replace(optimizer=abstract.optimizer._replace(moments=moments))
        )
        moments = state.optimizer.moments
        return state._replace(optimizer=state.optimizer._replace(moments=moments[:-1]))
    return None


def discard(directory: epath.PathLike, steps: Iterable[int]) -> None:
    """Remove these checkpoints, and the name of the best where it is one of them; process 0 does it."""
    for step in steps if jax.process_index() == 0 else ():
        if best_step(directory) == step:
            point_to(directory, None)
        path = epath.Path(directory) / str(step)
        (path / checkpoint.COMMIT).unlink(missing_ok=True)  # from here on it counts as incomplete
        path.rmtree(missing_ok=True)


def discard_unfinished(directory: epath.PathLike) -> None:
    """Remove what a save that was killed has left; it was never a checkpoint."""
    root = epath.Path(directory)
    names = [p.name for p in root.iterdir()] if root.exists() else []
    for step in {name.partition(".")[0] for name in names if "." in name}:
        if step.isdigit():
            checkpoint.discard_unfinished(root / step)
