"""What the processes of a run do together: wait for each other, compare, and tell each other what only one has.

Every process calls each of these, in the same order; alone, a process has nothing to wait for.
"""

import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import jax
import numpy as np
from etils import epath
from jax._src import distributed  # the key-value store that jax's own barriers use; it has no public name
from jax.experimental import multihost_utils

from mixtral_jax.data.records import is_remote
from mixtral_jax.train.errors import UserError

_PATIENCE_MILLISECONDS = 24 * 3600 * 1000  # one process may prepare data for hours
_meetings, _words = itertools.count(), itertools.count()  # a barrier opens once
_WORD, _KEPT = "mixtral_jax/told/", 100  # words that a slower process may still have to hear


def store() -> Any:
    """The key-value store of the coordinator."""
    client = distributed.global_state.client
    assert client is not None, "several processes always have a coordinator"
    return client


def meet(what: str) -> None:
    """Wait until every process has come as far. A collective waits too, but on CPUs for no longer than 30 s."""
    if jax.process_count() > 1:
        store().wait_at_barrier(f"mixtral_jax/{what}/{next(_meetings)}", _PATIENCE_MILLISECONDS)


def gather(values: np.ndarray) -> np.ndarray:
    """The values of every process, process 0's first."""
    if jax.process_count() == 1:
        return values[None]
    meet("gather")
    return np.asarray(multihost_utils.process_allgather(values))


def hear(values: np.ndarray, speaker: int) -> np.ndarray:
    """The values that process `speaker` has; those of the others say shape and dtype."""
    if jax.process_count() == 1:
        return values
    meet("hear")
    return np.asarray(multihost_utils.broadcast_one_to_all(values, is_source=jax.process_index() == speaker))


def told(say: Callable[[], str]) -> str:
    """What process 0 says, however long it takes to say it; costs the others one message."""
    if jax.process_count() == 1:
        return say()
    number = next(_words)
    if jax.process_index() > 0:
        return store().blocking_key_value_get(f"{_WORD}{number}", _PATIENCE_MILLISECONDS)[1:]
    word = say()
    store().key_value_set(f"{_WORD}{number}", f"={word}")  # never empty
    with suppress(jax.errors.JaxRuntimeError):
        store().key_value_delete(f"{_WORD}{number - _KEPT}")
    return word


def agree(**values: str | int) -> None:
    """Check that every process has the same values.

    Raises:
        UserError: some differ; the message names them.
    """
    table = gather(np.array([zlib.crc32(str(value).encode()) for value in values.values()], np.uint32))
    other = [name for name, column in zip(values, table.T, strict=True) if len(set(column.tolist())) > 1]
    if other:
        here = ", ".join(f"{name} {values[name]}" for name in other)
        raise UserError(
            f"the processes of this run differ in {' and '.join(other)} (process {jax.process_index()} has {here}): "
            "start all with the same file and overrides, on the same data, with a checkpoint directory that all see"
        )


def sharers(directory: epath.PathLike, *, must: bool = True) -> np.ndarray:
    """Of every process whether it sees what process 0 writes in `directory`: nobody does where that cannot write.

    Raises:
        OSError: it `must`, and cannot.
    """
    count = jax.process_count()
    if count == 1 or is_remote(os.fspath(directory)):
        return np.ones(count, bool)
    place = epath.Path(directory)
    number = np.frombuffer(os.urandom(8), np.uint32)  # a name that no one has looked for, and that no cache denies
    if jax.process_index() == 0:
        with nullcontext() if must else suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            _mark(place, number).touch()
    number = hear(number, 0)
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)  # asks the server, where NFS would keep a "no" that it heard before
    seen = gather(np.array(_mark(place, number).exists()))
    if seen.any() and jax.process_index() == 0:
        _mark(place, number).unlink(missing_ok=True)
    return seen


def _mark(place: epath.Path, number: np.ndarray) -> epath.Path:
    return place / f".seen-{number.tobytes().hex()}"


def check_shared(key: str, directory: epath.PathLike) -> None:
    """Check that `directory`, which the setting `key` names, is the same one for every process.

    Raises:
        UserError: some do not see what process 0 writes there.
    """
    blind = np.flatnonzero(~sharers(directory)).tolist()
    if blind:
        raise UserError(
            f"{key}: {directory} is not one directory for all processes: process {', '.join(map(str, blind[:8]))} does "
            "not see what process 0 writes there: name one on a file system that all share"
        )


@contextmanager
def first_alone(directory: epath.PathLike) -> Iterator[None]:
    """Process 0 makes in `directory` what is missing; who shares it comes after that, who has an own one meanwhile.

    Where process 0 may only read, everything is there already.
    """
    follows = sharers(directory, must=False)[jax.process_index()] and jax.process_index() > 0
    if follows:
        meet("made")
    yield
    if not follows:
        meet("made")
