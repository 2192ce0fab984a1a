"""Errors that are the user's to mend."""

import traceback


class UserError(ValueError):
    """A mistake in usage, configuration or data: shown as one sentence, exit code 2."""


def is_for_the_user(error: BaseException) -> bool:
    """A ValueError that our own code raised, or a file that is not there; the same from a library is our bug."""
    from pydantic import ValidationError  # slow to import, and only errors need it

    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError | ValidationError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    room = frames[-1][0].f_globals.get("__name__", "").split(".")[0]
    return isinstance(error, ValueError) and room in ("launch", "train", "data", "mixtral_jax", "__main__")
