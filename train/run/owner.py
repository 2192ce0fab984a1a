"""Whose a checkpoint directory is: that of one run, whose name stands in it."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mixtral_jax import checkpoint
from mixtral_jax.data.prepare import digest, write_atomically
from mixtral_jax.data.records import is_remote
from mixtral_jax.train.checkpoints import patiently, saved_steps, why
from mixtral_jax.train.config import STAGES
from mixtral_jax.train.errors import ExitCode, StorageError, UserError, failure_of, is_of_storage

OWNER = "OWNER.json"
# where a run lies and how it is watched, not what it is
_ELSEWHERE = (
    "output_dir", "checkpoint", "log", "eval", "sample", "resume", "resume_from", "steps", "stop_after_minutes",
)  # fmt: skip
_ELSEWHERE_OF_DATA = ("cache_dir", "staging_dir", "staging_bytes", "workers", "restart", "epochs", "validation")


class Owner(NamedTuple):
    """A run: the same name in another directory is another one, unless its configuration is the same (it was moved)."""

    run_name: str
    run_directory: str
    configuration: str  # digest


def owner_of(config: Mapping[str, Any]) -> Owner:
    """The run of a resolved configuration, as a checkpoint keeps it."""
    place = os.path.realpath(os.path.join(config["output_dir"], config["run_name"]))
    chosen = _chosen(config)
    what = {key: value for key, value in chosen.items() if key not in _ELSEWHERE}
    what["data"] = {key: value for key, value in chosen.get("data", {}).items() if key not in _ELSEWHERE_OF_DATA}
    return Owner(config["run_name"], place, digest(what))


def _chosen(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is not as by default: an older version may not have known the other settings."""
    try:
        known = STAGES[config["stage"]].model_validate_json(json.dumps(config))
    except (KeyError, ValueError):  # of a version that had others
        return config
    return known.model_dump(mode="json", exclude_defaults=True)


def check_owner(directory: epath.PathLike, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Nothing is touched. What lies inside the run's own directory is its own.

    Raises:
        UserError: the directory belongs to another run, both are named; or it cannot be looked into.
        StorageError: it does not answer.
    """
    now, root = owner_of(config), epath.Path(directory)
    look = partial(_noted, root, look=not _is_inside(directory, now))
    noted = patiently(f"checkpoint.directory: {directory} could not be read", look, say)
    if noted is None:
        return
    moved = noted.configuration == now.configuration
    if noted.run_name == now.run_name and (noted.run_directory == now.run_directory or moved):
        return
    raise UserError(
        f"checkpoint.directory: {directory} belongs to the run {noted.run_name} in {noted.run_directory}, and this is "
        f"the run {now.run_name} in {now.run_directory}: give each run a directory of its own"
    )


def note_owner(directory: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Make the directory, and note in it whose it is.

    Raises:
        UserError: it cannot be written to.
    """
    root, now = epath.Path(directory), owner_of(config)
    try:
        root.mkdir(parents=True, exist_ok=True)
        file, text = root / OWNER, json.dumps(now._asdict(), indent=2) + "\n"
        if is_remote(str(directory)):
            file.write_text(text)
        elif not _is_inside(directory, now):
            write_atomically(Path(file), text)
        else:  # the place says it
            probe = root / ".writable"
            probe.write_text("")
            probe.unlink()
    except Exception as error:
        if not is_of_storage(error):
            raise
        kind = UserError if failure_of(error).exit_code == ExitCode.USAGE else StorageError
        raise kind(f"checkpoint.directory: {directory} is not writable: {why(error)}") from error


def _is_inside(directory: epath.PathLike, owner: Owner) -> bool:
    return not is_remote(str(directory)) and Path(os.path.realpath(directory)).is_relative_to(owner.run_directory)


def _noted(root: epath.Path, look: bool) -> Owner | None:
    """As OWNER.json says, or where `look` the newest checkpoint that can be read; None: nothing says it."""
    try:
        steps = saved_steps(root)
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(f"checkpoint.directory: {root} cannot be looked into: {error.strerror}") from error
    with contextlib.suppress(*_NOTHING):
        return Owner(**json.loads((root / OWNER).read_text()))
    for step in reversed(steps) if look else ():
        with contextlib.suppress(*_NOTHING):
            return owner_of(checkpoint.read_item(root / str(step), "meta")["config"])
    return None


_NOTHING = (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError)  # broken, or somebody else's
