"""Where a run begins: anew, or from a checkpoint of the same data and shape."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mixtral_jax.config import MixtralConfig
from mixtral_jax.lora import LoraConfig
from mixtral_jax.train import checkpoints
from mixtral_jax.train.checkpoints import Found, Say
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.meetings import agree, check_shared, meet
from mixtral_jax.train.run.directory import RunDirectory


def where_to_start(
    config: RunConfig, directory: epath.PathLike, force: bool, place: RunDirectory, say: Say
) -> Found | None:
    """The checkpoint to resume from, and a directory without others that would be mistaken for this run's."""
    whose = config.model_dump(mode="json")
    _together(lambda: checkpoints.check_owner(directory, whose, say))
    existing = checkpoints.patiently(f"{directory} could not be read", lambda: checkpoints.saved_steps(directory), say)
    agree(force=int(force), checkpoint=existing[-1] if existing else -1)  # before anything is removed
    check_shared("checkpoint.directory", directory)
    _together(lambda: checkpoints.discard_unfinished(directory))
    newer = [s for s in existing if isinstance(config.resume, int) and s > config.resume]
    if force and not isinstance(config.resume, int):
        _together(lambda: _begin_anew(directory, existing, place))
        _together(lambda: checkpoints.own(directory, whose))
        return None
    if config.resume == "never" and existing:
        raise UserError(
            f"resume: never, but {directory} holds checkpoint {existing[-1]}: choose another run_name, or --force to "
            "replace it"
        )
    if newer and not force:
        raise UserError(
            f"resume: {config.resume}, but {directory} holds newer checkpoints ({', '.join(map(str, newer))}): choose "
            "another run_name, or --force to delete them"
        )
    found = checkpoints.find_together(directory, config.resume, say)
    _together(lambda: checkpoints.own(directory, whose))
    # One meeting whatever was found, so that processes that found different checkpoints reach the comparison in build
    _together(lambda: _begin_anew(directory, newer, place) if found is None else checkpoints.discard(directory, newer))
    return found


def _begin_anew(directory: epath.PathLike, steps: list[int], place: RunDirectory) -> None:
    checkpoints.discard(directory, steps)
    place.forget_results()


def _together(action: Callable[[], Any]) -> None:
    """Process 0 changes the shared directory while the others wait."""
    if jax.process_index() == 0:
        action()
    meet("run directory")


def check_same_data(found: Found, fingerprint: str, restart: bool, changed: Sequence[str] = ()) -> int:
    """The global row to go on from.

    Args:
        changed: `a.b: old -> new` of every setting that is another one than the checkpoint's.

    Raises:
        UserError: the data are others than those of the checkpoint, and data.restart is not set.
    """
    before = found.dataset["fingerprint"]
    if before == fingerprint:
        return int(found.dataset["next_row"])
    if restart:
        return 0
    blamed = [line for line in changed if line.startswith(_ORDERS) and not line.startswith(_NO_ORDER)]
    why = (
        f"made with {' and '.join(blamed)}, which now is another order of rows"
        if blamed
        else f"made from data with fingerprint {before}, but the data now have {fingerprint} (other files, or rows "
        "made by another version)"
    )
    raise UserError(
        f"checkpoint {found.step} was {why}: a position in one means nothing in the other. Set data.restart=true to "
        f"begin at the first row of the new {'order, or set it back' if blamed else 'data'}"
    )


_ORDERS = ("seed:", "seq_len:", "data.")
_NO_ORDER = ("data.cache_dir:", "data.workers:", "data.restart:", "data.epochs:", "data.validation:")


def tree_changes(changed: Sequence[str]) -> list[str]:
    """Those of the changed settings that say which parameters there are, of which shape, and which of them move."""
    return [line for line in changed if line.startswith(("model.", "lora", "router.update:", "optimizer.name:"))]


def check_same_base(found: Found, config: RunConfig) -> None:
    """A checkpoint of adapters means nothing beside another base, or at another scale.

    Raises:
        UserError: init_from is not the one that the adapters were trained on, or `lora` says something else of them.
    """
    then, now = found.meta["config"], config.model_dump(mode="json")
    for key, (ours, made) in config.model.differences(MixtralConfig(**then["model"])).items():
        raise UserError(
            f"checkpoint {found.step} was trained with model.{key} {made}, which is now {ours}: set it back, or "
            "choose another run_name with init_from"
        )
    old, new = then.get("lora"), now.get("lora")
    if old is None or new is None:
        if old != new:
            kinds = ("the whole model", "adapters") if old is None else ("adapters", "the whole model")
            raise UserError(
                f"checkpoint {found.step} is of a run that trained {kinds[0]}, and lora now asks for {kinds[1]}: "
                "set it back, or choose another run_name"
            )
        return
    keys = ("rank", "alpha", "rslora", "targets", "modules_to_save", "base_dtype", "base_block")
    pairs: dict[str, tuple[Any, Any]] = {"init_from": (then.get("init_from"), config.init_from)}
    if found.meta.get("base") and config.init_from is not None:
        pairs = {}  # pin_base compares
    then_default = LoraConfig().model_dump(mode="json")  # of a checkpoint written before a setting existed
    pairs |= {f"lora.{key}": (old.get(key, then_default[key]), new[key]) for key in keys}
    for key, (before, after) in pairs.items():
        if before != after:
            raise UserError(
                f"the adapters of checkpoint {found.step} were trained on {key} {before}, which is now {after}: "
                "set it back, or choose another run_name"
            )


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`a.b: old -> new` for every leaf that differs."""
    lines = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += config_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(new)}")
    return lines
