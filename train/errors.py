"""Errors that are the user's to mend, and what a process says with its exit code."""

import difflib
import traceback
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Supervisors read these: 2, 3 and 4 are final; 75 and 124 mean that the same command goes on (docs/runs.md)."""

    DONE = 0  # or nothing left to do
    UNEXPECTED = 1
    USAGE = 2  # usage, configuration, or the format of data
    NOT_FINITE = 3  # loss or gradient; the last good checkpoint stands
    DIFFERENT = 4  # `convert verify` found a difference
    STOPPED = 75  # on request, and saved
    WATCHDOG = 124
    AT_ONCE = 130  # as a shell reports a process that Ctrl-C ended


class UserError(ValueError):
    """A mistake in usage, configuration or data: shown as one sentence, exit code 2."""


def is_for_the_user(error: BaseException) -> bool:
    """A ValueError (or NaN found) by our own code, or a file that is not there; the same from a library is our bug."""
    from pydantic import ValidationError  # slow to import, and only errors need it

    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError | ValidationError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    room = frames[-1][0].f_globals.get("__name__", "").split(".")[0]
    return isinstance(error, ValueError | FloatingPointError) and room in ("launch", "mixtral_jax", "__main__")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is unknown: the nearest known one, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
