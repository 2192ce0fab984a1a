"""`resume_from: RUN[@STEP]`: the whole state of another run, which is only read, begins this one under its own name."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from etils import epath

from mixtral_jax import checkpoint
from mixtral_jax.data.records import is_remote
from mixtral_jax.train import checkpoints
from mixtral_jax.train.base import checkpoints_of, stands_on_base
from mixtral_jax.train.checkpoints import Found, Say, find_together, whole_steps
from mixtral_jax.train.config import RunConfig, run_and_step
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.state import TrainState


class Trunk(NamedTuple):
    """What resume_from names."""

    run: str  # as it is named, without the step
    directory: epath.PathLike  # of its checkpoints
    step: int | None  # None: the newest


def trunk_of(named: str) -> Trunk:
    """A run's directory, or that of its checkpoints, which alone an address names, and the step behind an @.

    Raises:
        UserError: it is not there, or no such address is read.
    """
    path, number = run_and_step(named)
    if is_remote(path):
        if not path.startswith(("gs://", "s3://")):
            raise UserError(f"resume_from: {path} must be a directory of a file system, gs:// or s3://")
        return Trunk(path, path, number)
    if not Path(path).is_dir():
        raise UserError(f"resume_from: {path} is no directory: name a run (RUN or RUN@STEP), or its checkpoints")
    place = Path(path).parent / os.readlink(path) if os.path.islink(path) else Path(path)  # such as checkpoints/best
    if place.name.isdecimal() and (place / checkpoint.STATE).exists():  # a step itself
        return Trunk(str(place.parent), place.parent, int(place.name))
    return Trunk(path, checkpoints_of(Path(path)), number)


def find_trunk(config: RunConfig, own: epath.PathLike, say: Say) -> Found:
    """The checkpoint of another run that this one begins with, the same for all processes; nothing there is touched.

    Args:
        own: the directory of this run's checkpoints.

    Raises:
        UserError: it is this run itself, holds no whole checkpoint, or not the one that is named.
    """
    assert config.resume_from is not None
    trunk = trunk_of(config.resume_from)
    if _is_one(trunk.directory, own) or _is_one(trunk.run, config.run_dir):
        raise UserError(
            f"resume_from: {trunk.run} is this run itself, which resumes from its own checkpoints: set resume_from "
            "null (resume=STEP goes back in it), or choose another run_name"
        )
    found = None
    with contextlib.suppress(UserError):  # which speaks of `resume`
        found = find_together(trunk.directory, "auto" if trunk.step is None else trunk.step, say)
    if found is None:
        which, whole = "" if trunk.step is None else f" {trunk.step}", sorted(whole_steps(trunk.directory))
        hint = "name the directory of the checkpoints; " * is_remote(trunk.run) + "weights alone are for init_from"
        has = f"it has {', '.join(map(str, whole))}" if whole else f"it has none ({hint})"
        raise UserError(f"resume_from: {trunk.directory} holds no whole checkpoint{which}: {has}")
    origin = {"run": trunk.run, "step": found.step}
    # patience, and the best so far, are of that run: its checkpoints are not among ours
    found = found._replace(trunk=trunk.run, meta={**found.meta, "best": None, "resumed_from": origin})
    say(f"resume_from: this run begins with {found.name}")
    return found


def check_some_left(found: Found, steps: int) -> None:
    """Whether a step is left to a run that begins with this checkpoint of another one; `steps` 0: not known yet.

    Raises:
        UserError: none is.
    """
    if found.trunk and steps and found.step >= steps:
        raise UserError(
            f"resume_from: {found.name} has done {found.step} steps, which count as this run's, and steps is {steps}: "
            "set steps above it, or name an earlier checkpoint (RUN@STEP)"
        )


def restored(found: Found, abstract: TrainState, changed: Sequence[str] = ()) -> TrainState:
    """What `restore_state` says, of a checkpoint that is still whole behind it: of half of one no part is used.

    Raises:
        UserError: another run has removed it meanwhile; see also `restore_state`.
    """
    try:
        return checkpoints.restore_state(found, abstract, changed)
    finally:  # whatever reading it has raised
        if found.trunk and checkpoint.damage(found.path) is not None:
            raise UserError(
                f"resume_from: {found.name} was removed while it was read (that run goes on and keeps the newest "
                "checkpoint.keep_last): start again with a newer one, or let it keep some (checkpoint.keep_every)"
            )


def as_it_stands(config: RunConfig, found: Found | None) -> RunConfig:
    """With the base of the run that resume_from names, where weights of that base are read again: init_from says it."""
    if config.resume_from is None or found is None:
        return config
    based = config.model_copy(update={"init_from": found.meta["config"].get("init_from"), "resume_from": None})
    return based if stands_on_base(based) else config


def _is_one(a: epath.PathLike, b: epath.PathLike) -> bool:
    a, b = str(a), str(b)
    return a == b or (not (is_remote(a) or is_remote(b)) and os.path.realpath(a) == os.path.realpath(b))
