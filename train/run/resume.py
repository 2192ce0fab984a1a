"""Where a run begins: anew, or from a checkpoint of the same data and shape."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from mixtral_jax import checkpoint
from mixtral_jax.config import MixtralConfig
from mixtral_jax.data.records import is_remote
from mixtral_jax.data.text import Tokenizer
from mixtral_jax.lora import LoraConfig
from mixtral_jax.train import checkpoints
from mixtral_jax.train.base import needs_base
from mixtral_jax.train.checkpoints import Best, Found, Say
from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.console import Console
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.meetings import agree, check_shared, meet, told
from mixtral_jax.train.optimizer import make_optimizer
from mixtral_jax.train.run.account import check_order
from mixtral_jax.train.run.check import check, check_place, sizes_of
from mixtral_jax.train.run.directory import RunDirectory, free_name
from mixtral_jax.train.run.fork import as_it_stands, check_some_left, find_trunk
from mixtral_jax.train.run.lease import FILE as LEASE
from mixtral_jax.train.run.owner import check_owner, note_owner
from mixtral_jax.train.run.tokenizer_copy import check_tokenizer, keep_tokenizer
from mixtral_jax.train.run.xla_flags import set_xla_flags
from mixtral_jax.train.state import abstract_state, as_stored
from mixtral_jax.train.weights import abstract_params, is_trained, keep


class Start(NamedTuple):
    """Where a run begins, and what is left to do once nothing can be refused any more."""

    found: Found | None  # a checkpoint to go on from; None: anew
    directory: epath.PathLike  # of the checkpoints
    clear: Callable[[Console], None]  # makes room; all processes call it
    notes: list[str]  # to be said
    config: RunConfig  # with the base of the run that resume_from names
    forced: bool

    @property
    def again(self) -> str:
        """What goes on where the run is stopped: the same command may begin elsewhere, or be refused."""
        if self.forced or not self.config.goes_on:
            return "go on with resume=auto" + " and without --force" * self.forced
        return "run the same command again"

    def nothing_left(self, config: RunConfig, best: Best, say: Say) -> str:
        """Why no step is left to do, and which settings are others than those of the steps that were done.

        Raises:
            UserError: a run that resume_from names has done all of them.
        """
        found = self.found
        if found is None:
            return ""
        check_some_left(found, config.steps)
        if found.step >= config.steps:
            why = f"{found.step} of {config.steps} steps are done (--force starts again)"
        elif best.exhausted:
            why = f"{best.why_stopped} (a larger early_stopping.patience goes on)"
        else:
            return ""
        checkpoints.name_best(self.directory, best.step)
        changed = changed_since(found, config)
        for line in changed:
            say(f"  changed {line}")
        return why + f"; changed since, without effect: {', '.join(changed)}" * bool(changed)


def where_to_start(
    config: RunConfig, force: bool, place: RunDirectory, make_mesh: Callable[[], jax.sharding.Mesh | None]
) -> Start:
    """Own the run's directory, in which everything is as it was: what can be refused in a second is refused here.

    Args:
        make_mesh: asked where steps are left.

    Raises:
        UserError: see `survey`; another process writes this run.
    """
    directory, own = config.checkpoint.directory or place.checkpoints, own_directory(config)
    whose, notes = config.model_dump(mode="json"), list[str]()
    found, tokenizer, _ = survey(config, force, lambda: sizes_of(make_mesh()), notes.append)
    place.create()
    anew, waited = force and not isinstance(config.resume, int), place.hold(own)

    def stale() -> str:  # somebody wrote here until just now
        newest = max(_listed(directory, notes.append), default=None)
        known = found.step if found is not None and not found.trunk else None
        return "stale" if waited or (not anew and newest != known) else ""

    if told(stale):
        notes.clear()
        found = look(config, directory, force, notes.append)
    check_shared("checkpoint.directory", directory)
    place.replaces = anew
    if not anew:
        _together(lambda: note_owner(directory, whose))
    place.start = 0 if found is None else found.step

    def make_room(say: Say) -> list[str]:
        moved = []
        if anew:
            apart = own is not None and not own.is_relative_to(place.path.resolve())
            if _listed(directory, say) or place.holds_a_run():
                moved = place.move_aside(own if apart else None)
            note_owner(directory, whose)
        else:
            moved = _leave_branch(place, directory, newer_steps(config, _listed(directory, say)))
        remove = partial(checkpoints.discard_unfinished, directory)
        checkpoints.patiently(f"{directory} could not be tidied", remove, say)
        if found is None or found.trunk:
            place.forget_results()
        return moved

    def clear(console: Console) -> None:
        lines = _together(partial(make_room, console.say))
        if anew:
            place.replaces = False
            place.create()
            console.move(place.log)
            place.begin()
        if tokenizer is not None and jax.process_index() == 0:
            keep_tokenizer(place.path, tokenizer, config)
        for line in lines:
            console.say(line)

    place.resumed_from = found and found.meta.get("resumed_from")
    return Start(found, directory, clear, [*waited, *notes], as_it_stands(config, found), force)


def survey(
    config: RunConfig, force: bool, sizes: Callable[[], Mapping[str, int]], say: Say, *, finished: bool = False
) -> tuple[Found | None, Tokenizer | None, list[str]]:
    """All that a second can tell: the checkpoint to go on from, the tokenizer, and notes on the base.

    Of a run in which no step is left only the checkpoint, unless `finished` asks for the rest.

    Raises:
        UserError: see `look`, `check` and `check_order`; or the run began with another tokenizer, or cannot be written.
    """
    set_xla_flags(config.compute.xla_flags)  # in a library's use the last place before devices are asked for
    check_place("output_dir", config.run_dir)
    directory = config.checkpoint.directory or config.run_dir / "checkpoints"
    check_place("checkpoint.directory", directory)
    found = look(config, directory, force, say)
    if not finished and found is not None and config.steps and found.step >= config.steps:
        return found, None, []
    if found is not None and not (config.steps and found.step >= config.steps):
        check_order(found, config)
    tokenizer, notes = check(as_it_stands(config, found), sizes(), resumes=found is not None)
    if found is not None and not config.data.restart:
        runs = (Path(found.trunk), Path(found.path).parents[1]) if found.trunk else (config.run_dir,)
        if not any(check_tokenizer(run, tokenizer) for run in runs) and found.trunk:
            say(f"resume_from: {found.trunk} has no copy of its tokenizer here, so data.tokenizer was not compared")
    return found, tokenizer, notes


def look(config: RunConfig, directory: epath.PathLike, force: bool, say: Say) -> Found | None:
    """The checkpoint to resume from, this run's own or else resume_from's; touches nothing.

    It is the same for all processes, which all look.

    Raises:
        UserError: there is none where one must be, or one that must not be there, or that is of another model; or what
            --force would move cannot be moved.
    """
    _together(lambda: check_owner(directory, config.model_dump(mode="json"), say))
    existing: list[int] = json.loads(told(lambda: json.dumps(_listed(directory, say))))  # others may see an older list
    agree(force=int(force))
    newer = newer_steps(config, existing)
    if force and existing and is_remote(str(directory)):
        raise UserError(
            f"--force: checkpoints in {directory} cannot be moved aside by a rename: move them, or name another "
            "checkpoint.directory"
        )
    if anew := force and not isinstance(config.resume, int):
        _check_movable(config)
    elif force and newer:
        _check_rename(Path(directory).resolve())
    if config.resume == "never" and existing and not anew:
        raise UserError(
            f"resume: never, but {directory} holds checkpoint {existing[-1]}: choose another run_name, or --force to "
            "move it aside"
        )
    if newer and not force:
        raise UserError(
            f"resume: {config.resume}, but {directory} holds newer checkpoints ({', '.join(map(str, newer))}): choose "
            "another run_name, or --force to move them aside"
        )
    found = None if anew else checkpoints.find_together(directory, config.resume, say)
    if found is None and config.resume_from is not None:
        found = find_trunk(config, directory, say)
        check_some_left(found, config.steps)
    if found is not None:
        stands = as_it_stands(config, found)
        check_same_base(found, stands)
        check_same_tree(found, stands)
    return found


def _listed(directory: epath.PathLike, say: Say) -> list[int]:
    """The steps that have a directory; asked for again where storage does not answer."""
    return checkpoints.patiently(f"{directory} could not be read", lambda: checkpoints.saved_steps(directory), say)


def newer_steps(config: RunConfig, steps: list[int]) -> list[int]:
    """Those after the step that `resume` names."""
    return [step for step in steps if isinstance(config.resume, int) and step > config.resume]


def own_directory(config: RunConfig) -> Path | None:
    """The directory of checkpoints where it is another one than the run's own, and on a file system."""
    named = config.checkpoint.directory
    return Path(named).resolve() if named is not None and not is_remote(named) else None


def _check_movable(config: RunConfig) -> None:
    own, run = own_directory(config), config.run_dir.resolve()
    _check_rename(run)
    if own is None or not own.exists() or own.is_relative_to(run):
        return
    _check_rename(own)
    ours = re.compile(rf"\d+(\..*)?|\..*|{LEASE}.*|OWNER\.json|best(\.tmp)?")
    others = sorted(p.name for p in own.iterdir() if not ours.fullmatch(p.name))
    if others:
        raise UserError(
            f"--force: checkpoint.directory {own} cannot be moved aside, as it holds more than checkpoints "
            f"({', '.join(others[:3])}): name another one"
        )


def _check_rename(place: Path) -> None:
    if not place.exists() or not any(not p.name.startswith(("logs", LEASE)) for p in place.iterdir()):
        return
    why = "it is where a file system is mounted" if os.path.ismount(place) else ""
    if not os.access(place.parent, os.W_OK | os.X_OK):
        why = f"{place.parent} may not be written to"
    if why:
        raise UserError(f"--force: {place} cannot be moved aside: {why}")


def _leave_branch(place: RunDirectory, directory: epath.PathLike, steps: list[int]) -> list[str]:
    """Move these checkpoints, on a file system, and what was made of them aside; sentences of what was done."""
    if not steps:
        return []
    said = place.set_results_aside(place.start)  # first, for checkpoints tell of results
    root = Path(directory).resolve()  # beside what a link points to, so that a rename is enough
    aside, link = free_name(root), root / "best"
    aside.mkdir()
    if link.is_symlink() and os.readlink(link) in map(str, steps):
        link.unlink()
    for step in steps:
        os.rename(root / str(step), aside / str(step))
    return [*said, f"checkpoints {', '.join(map(str, steps))} were moved to {aside}"]


def _together(action: Callable[[], Any]) -> Any:
    """Process 0 changes the shared directory while the others wait."""
    done = action() if jax.process_index() == 0 else []
    meet("run directory")
    return done


def tree_changes(changed: Sequence[str]) -> list[str]:
    """Those of the changed settings that say which parameters there are, of which shape, and which of them move."""
    return [line for line in changed if line.startswith(("model.", "lora", "router.update:", "optimizer.name:"))]


def check_same_tree(found: Found, config: RunConfig) -> None:
    """Whether the state of a run of this configuration has the leaves of the checkpoint; looked at where it may not.

    Raises:
        UserError: a leaf has another shape, or is in one alone; it is named, and so is what changed.
    """
    changed = tree_changes(changed_since(found, config))
    if not changed:
        return
    weights = keep(abstract_params(config, None), is_trained(config))
    optimizer = make_optimizer(config.optimizer, 1 << 30, config.router_factor)  # its tree is that of any steps
    then = found.meta["config"].get("optimizer", {}).get("state_dtype", "float32")
    state = as_stored(abstract_state(weights, optimizer), then)
    try:
        checkpoint.check_fits(found.path, state)
    except ValueError as error:
        raise UserError(
            f"{found.name} does not fit: {error}; changed since then: {', '.join(changed)}: set it back, or "
            "choose another run_name"
        ) from error


def check_same_base(found: Found, config: RunConfig) -> None:
    """A checkpoint of adapters means nothing beside another base, or at another scale; nor one of another stage.

    Raises:
        UserError: the stage is another; or init_from is not the one that the adapters were trained on or the reference
            is made of, or `lora` says something else of them.
    """
    then, now = found.meta["config"], config.model_dump(mode="json")
    if (stage := then.get("stage", config.stage)) != config.stage:
        raise UserError(
            f"{found.name} is of a run of stage {stage}, and this is stage {config.stage}: choose another "
            "run_name, with init_from"
        )
    for key, (ours, made) in config.model.differences(MixtralConfig(**then["model"])).items():
        raise UserError(
            f"{found.name} was trained with model.{key} {made}, which is now {ours}: set it back, or "
            "choose another run_name with init_from"
        )
    old, new = then.get("lora"), now.get("lora")
    if old is None or new is None:
        if old != new:
            kinds = ("the whole model", "adapters") if old is None else ("adapters", "the whole model")
            raise UserError(
                f"{found.name} is of a run that trained {kinds[0]}, and lora now asks for {kinds[1]}: "
                "set it back, or choose another run_name"
            )
        if not needs_base(config):
            return
    keys = ("rank", "alpha", "rslora", "targets", "modules_to_save", "base_dtype", "base_block")
    pairs: dict[str, tuple[Any, Any]] = {"init_from": (then.get("init_from"), config.init_from)}
    if config.init_from is None:
        pairs["seed"] = then.get("seed", config.seed), config.seed  # of random numbers, which are made again
    elif found.meta.get("base"):
        pairs = {}  # pin_base compares
    then_default = LoraConfig().model_dump(mode="json")  # of a checkpoint written before a setting existed
    pairs |= {f"lora.{key}": (old.get(key, then_default[key]), new[key]) for key in keys if old and new}
    for key, (before, after) in pairs.items():
        if before != after:
            what = "the adapters of {} were trained on" if new else "the reference of {} is made of"
            before, after = ("null" if value is None else value for value in (before, after))
            raise UserError(
                f"{what.format(found.name)} {key} {before}, which is now {after}: "
                "set it back, or choose another run_name"
            )


def changed_since(found: Found | None, config: RunConfig) -> list[str]:
    """`a.b: old -> new` of every setting that is another one than the checkpoint's."""
    return (
        config_differences(found.meta["config"], as_it_stands(config, found).model_dump(mode="json")) if found else []
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
