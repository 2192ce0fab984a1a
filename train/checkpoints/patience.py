"""Storage that refuses may take what it is given a little later."""

import time
from collections.abc import Callable
from typing import TypeVar

import jax

from mixtral_jax.train.errors import AGAIN, StorageError, failure_of, is_of_storage

PAUSES = (1.0, 3.0, 9.0)  # seconds before each further attempt

T = TypeVar("T")


def why(error: BaseException) -> str:
    """What storage said, in a few words."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.partition("\n")[0][:300] or type(error).__name__


def remedy(error: BaseException) -> str:
    """What to do about it."""
    return failure_of(error).remedy or AGAIN


def patiently(what: str, action: Callable[[], T], say: Callable[[str], None], *, alone: bool = True) -> T:
    """action(), again after each of PAUSES where storage refuses.

    Args:
        what: could not be done, for the sentence.
        alone: the others do not take part in it; else it is tried once, as they would wait for this process.

    Raises:
        StorageError: it still refuses.
    """
    for pause in (*(PAUSES if alone or jax.process_count() == 1 else ()), None):
        try:
            return action()
        except Exception as error:
            if not is_of_storage(error):
                raise
            if pause is None:
                raise StorageError(f"{what}: {why(error)}; {remedy(error)}") from error
            say(f"{what}: {why(error)}; trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")
