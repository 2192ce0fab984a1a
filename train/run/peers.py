"""The other processes of a run: do they mean the same run, and has one of them failed?

A process that fails says so where all can read it. Without that the others would wait in a collective for a partner
that is gone, until the heartbeats of jax's coordination service end them without a word (after 100 s).
"""

import atexit
import itertools
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the key-value store that jax's own barriers use; it has no public name
from jax.experimental import multihost_utils

from mixtral_jax.train.errors import ExitCode, UserError, is_for_the_user
from mixtral_jax.train.run.directory import RunDirectory

_KEY = "mixtral_jax/failed"
_PATIENCE_MILLISECONDS = 24 * 3600 * 1000  # one process may prepare data for hours
_meetings = itertools.count()  # a barrier opens once
_POLL_SECONDS, _GRACE_SECONDS, _LAST_SECONDS = 1.0, 3.0, 6.0


def meet(what: str) -> None:
    """Wait until every process has come as far. A collective waits too, but on CPUs for no longer than 30 s."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(f"mixtral_jax/{what}/{next(_meetings)}", _PATIENCE_MILLISECONDS)


def agree(**values: str | int) -> None:
    """Check that every process has the same values; all of them call this.

    Raises:
        UserError: some differ; the message names them.
    """
    if jax.process_count() == 1:
        return
    meet("agree")
    own = [zlib.crc32(str(value).encode()) for value in values.values()]
    table = multihost_utils.process_allgather(np.array(own, np.uint32))
    other = [name for name, column in zip(values, table.T, strict=True) if len(set(column.tolist())) > 1]
    if other:
        here = ", ".join(f"{name} {values[name]}" for name in other)
        raise UserError(
            f"the processes of this run differ in {' and '.join(other)} (process {jax.process_index()} has {here}): "
            "start all with the same file and overrides, on the same data, with a checkpoint directory that all see"
        )


@contextmanager
def failures_reported(place: RunDirectory) -> Iterator[None]:
    """An exception that ends this process is said in STATUS and to the other processes; theirs end this one."""
    ended = threading.Event()
    if jax.process_count() > 1:
        threading.Thread(target=_watch, args=(place, ended), name="peers", daemon=True).start()
    try:
        yield
    except BaseException as error:
        failure = _read() if isinstance(error, jax.errors.JaxRuntimeError) else None
        if failure is not None:  # a collective broke off since its partner is gone
            _end_with(failure, place)
        code = ExitCode.USAGE if is_for_the_user(error) else ExitCode.UNEXPECTED
        reason = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # there may be no run directory
            place.write_status("failed", -1, reason, code)
        if jax.process_count() > 1:
            failure = {"process": jax.process_index(), "reason": reason, "exit_code": code}
            _store().key_value_set(_KEY, json.dumps(failure), allow_overwrite=True)
            atexit.register(_end, code)  # without jax's own farewell, which waits for all
        raise
    finally:
        ended.set()


def _watch(place: RunDirectory, ended: threading.Event) -> None:
    """End this process where another one has failed."""
    while not ended.wait(_POLL_SECONDS):
        failure = _read()
        # it may be failing for the same reason: let it say so itself
        if failure is not None and not ended.wait(_GRACE_SECONDS):
            _end_with(failure, place)


def _end_with(failure: dict[str, Any], place: RunDirectory) -> None:
    code, reason = failure["exit_code"], f"process {failure['process']} failed: {failure['reason']}"
    with suppress(OSError):
        place.write_status("failed", -1, reason, code)
    print(f"exit {code}: {reason}", file=sys.stderr)
    _end(code)


def _store() -> Any:
    client = distributed.global_state.client
    assert client is not None, "several processes always have a coordinator"
    return client


def _read() -> dict[str, Any] | None:
    if jax.process_count() == 1:
        return None
    try:
        return json.loads(_store().key_value_try_get(_KEY))
    except (jax.errors.JaxRuntimeError, AssertionError):  # nobody has failed, or the coordinator is gone
        return None


def _end(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(_LAST_SECONDS)  # the coordinator lives here: the others want to read the failure
    os._exit(exit_code)
