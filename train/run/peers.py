"""The other processes of a run: do they mean the same run, and has one of them failed?

A process that fails says so where all can read it, and one that is killed stops to say that it lives. Without that
the others would wait for a partner that is gone, until jax's coordination service aborts them (after 100 s).
"""

import itertools
import json
import os
import re
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

from mixtral_jax.train.errors import AGAIN, ExitCode, PeerLost, UserError, explain, failure_of, is_raised_by_us
from mixtral_jax.train.run.directory import RunDirectory

_KEY, _ALIVE, _LEFT = "mixtral_jax/failed", "mixtral_jax/alive/", "left"
_PATIENCE_MILLISECONDS = 24 * 3600 * 1000  # one process may prepare data for hours
_meetings = itertools.count()  # a barrier opens once
_POLL_SECONDS, _GRACE_SECONDS, _LAST_SECONDS = 1.0, 3.0, 6.0
_SILENT_POLLS = 40  # of a process that is taken for lost; counted, as the clock goes on where all of a machine stands
# what gloo, NCCL and jax's coordination service say where a partner is gone
_BROKEN_OFF = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|socket closed|unavailable|deadline_exceeded|heartbeat|unhealthy", re.I
)


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
    watch = threading.Thread(target=_watch, args=(place, ended), name="peers", daemon=True)
    if jax.process_count() > 1:
        watch.start()
    try:
        yield
    except BaseException as error:
        several = jax.process_count() > 1
        if several and _is_broken_off(error):
            if (failure := _read()) is not None:  # the partner has said why it is gone
                _end_with(failure, place)
            told = str(error).partition("\n")[0]
            error = PeerLost(f"another process of the run is lost, in the middle of a step or a save ({told}); {AGAIN}")
        code = failure_of(error).exit_code
        reason = f"{type(error).__name__}: {error}"
        place.write_failure(reason, code)
        if several:
            explain(error)
            _tell(code, reason)
            _end(code)  # without jax's own farewell, which waits for all, and without a save that does
        raise
    finally:
        ended.set()
        if watch.ident is not None:
            watch.join(_GRACE_SECONDS)  # it says that we have left, before jax's client goes


def _is_broken_off(error: BaseException) -> bool:
    """Whether a collective ended because a partner is gone."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _BROKEN_OFF.search(str(error)) is not None
    return isinstance(error, ValueError) and "gloo" in str(error).lower() and not is_raised_by_us(error)


def _tell(code: int, reason: str) -> None:
    failure = {"process": jax.process_index(), "reason": reason, "exit_code": code}
    with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone
        _store().key_value_set(_KEY, json.dumps(failure), allow_overwrite=True)


def _watch(place: RunDirectory, ended: threading.Event) -> None:
    """Say that this process lives; end it where another one has failed or is lost."""
    heard: dict[str, tuple[str, int]] = {}  # what each process said last, and for how many polls
    for beat in itertools.count():
        left = ended.wait(_POLL_SECONDS)
        with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone: joining.py sees to that
            said = _LEFT if left else str(beat)
            _store().key_value_set(f"{_ALIVE}{jax.process_index()}", said, allow_overwrite=True)
        if left:
            return
        with suppress(jax.errors.JaxRuntimeError):
            if jax.process_index() == 0 and (lost := _silent(_store().key_value_dir_get(_ALIVE), heard)):
                error = PeerLost(f"process {lost} of the run has not been heard of for {_SILENT_POLLS} s; {AGAIN}")
                reason = f"{type(error).__name__}: {error}"
                _tell(ExitCode.PEER_LOST, reason)
                place.write_failure(reason, ExitCode.PEER_LOST)
                explain(error)
                _end(ExitCode.PEER_LOST)
        failure = _read()
        # it may be failing for the same reason: let it say so itself
        if failure is not None and not ended.wait(_GRACE_SECONDS):
            _end_with(failure, place)


def _silent(said: list[tuple[str, str]], heard: dict[str, tuple[str, int]]) -> str:
    """The number of a process that has said nothing new for too long, or nothing; `heard` is brought up to date."""
    for key, beat in said:
        before, polls = heard.get(key, ("", 0))
        heard[key] = (beat, polls + 1 if beat == before != _LEFT else 0)
    return next((key.rpartition("/")[2] for key, (_, polls) in heard.items() if polls >= _SILENT_POLLS), "")


def _end_with(failure: dict[str, Any], place: RunDirectory) -> None:
    code, reason = failure["exit_code"], f"process {failure['process']} failed: {failure['reason']}"
    place.write_failure(reason, code)
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
