"""The other processes of a run: has one of them failed?

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
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from mixtral_jax.train.checkpoints import Together
from mixtral_jax.train.errors import AGAIN, ExitCode, PeerLost, explain, failure_of, is_raised_by_us
from mixtral_jax.train.meetings import meet, store
from mixtral_jax.train.run.directory import RunDirectory

_KEY, _ALIVE, _LEFT, _STOP = "mixtral_jax/failed", "mixtral_jax/alive/", "left", "mixtral_jax/stop"
_POLL_SECONDS, _GRACE_SECONDS, _LAST_SECONDS = 1.0, 3.0, 6.0
_SILENT_POLLS = 40  # of a process that is taken for lost; counted, as the clock goes on where all of a machine stands
# what gloo, NCCL and jax's coordination service say where a partner is gone
_BROKEN_OFF = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|socket closed|unavailable|deadline_exceeded|heartbeat|unhealthy", re.I
)


@contextmanager
def failures_reported(place: RunDirectory | None) -> Iterator[None]:
    """An exception that ends this process is said in STATUS and to the other processes; theirs end this one."""
    watch = _Watch(place)
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
        _note(place, reason, code)
        if place is not None and code != ExitCode.USAGE:
            with suppress(OSError), place.log.open("a", encoding="utf-8") as log:  # a bug may lie behind the sentence
                traceback.print_exception(error, file=log)
        if several:
            explain(error)
            _tell(code, reason)
        if place is not None:
            place.leave_page()
        if several:
            _end(code)  # without jax's own farewell, which waits for all, and without a save that does
        raise
    finally:
        watch.close()


def end_all(exit_code: ExitCode, reason: str, place: RunDirectory) -> None:
    """End this process now, from any thread, and those of the same run, with this exit code."""

    def note() -> None:
        if jax.process_count() > 1:
            _tell(exit_code, reason)
        place.write_failure(reason, exit_code)

    def say() -> None:
        with suppress(OSError, ValueError):  # a terminal that is closed
            sys.stdout.flush()
            print(f"exit {exit_code}: {reason}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=f, daemon=True) for f in (note, say)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_GRACE_SECONDS)  # no disk, coordinator or reader of the output that does not answer holds this up
    _leave(exit_code)


def ask_to_stop(why: str) -> None:
    """Let the other processes know why this one wants the run to stop; the first reason counts."""
    with suppress(jax.errors.JaxRuntimeError):  # there is one, or the coordinator is gone
        store().key_value_set(_STOP, why)


def asked_to_stop() -> str | None:
    """What one of the processes has said."""
    try:
        return str(store().key_value_try_get(_STOP))
    except jax.errors.JaxRuntimeError:
        return None


def _is_broken_off(error: BaseException) -> bool:
    """Whether a collective ended because a partner is gone."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _BROKEN_OFF.search(str(error)) is not None
    return isinstance(error, ValueError) and "gloo" in str(error).lower() and not is_raised_by_us(error)


def _tell(code: int, reason: str) -> None:
    failure = {"process": jax.process_index(), "reason": reason, "exit_code": code}
    with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone
        store().key_value_set(_KEY, json.dumps(failure), allow_overwrite=True)


class _Watch:
    """Says that this process lives, and ends it where another one has failed or is lost.

    Two threads: a call of the store lasts for as long as the coordinator is cut off or stopped, so that what counts
    the polls without an answer must not be what asks.
    """

    def __init__(self, place: RunDirectory | None) -> None:
        self._place, self._ended, self._answers = place, threading.Event(), 0
        self._threads = [threading.Thread(target=f, name="peers", daemon=True) for f in (self._ask, self._count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Say that we have left, before jax's client goes."""
        self._ended.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_GRACE_SECONDS)

    def _ask(self) -> None:
        me = jax.process_index()
        # what each process said last, and for how many polls; one that is lost before its first word counts too
        heard = {f"{_ALIVE}{i}": ("", 0) for i in range(jax.process_count() if me == 0 else 0)}
        for beat in itertools.count():
            left = self._ended.wait(_POLL_SECONDS)
            with suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone or cut off: counted
                said = _LEFT if left else str(beat)
                store().key_value_set(f"{_ALIVE}{me}", said, allow_overwrite=True)
                self._answers += 1
            if left:
                return
            if lost := _silent(_beats(me), heard):
                self._lost(f"process {lost} of the run has not been heard of for {_SILENT_POLLS} s", tell=me == 0)
            failure = _read()
            # it may be failing for the same reason: let it say so itself
            if failure is not None and failure["process"] != me and not self._ended.wait(_GRACE_SECONDS):
                _end_with(failure, self._place)

    def _count(self) -> None:
        before, polls = 0, 0
        while not self._ended.wait(_POLL_SECONDS):
            before, polls = self._answers, polls + 1 if self._answers == before else 0
            if polls >= _SILENT_POLLS:
                self._lost(f"process 0, which coordinates the run, has not answered for {_SILENT_POLLS} s", tell=False)

    def _lost(self, what: str, tell: bool) -> None:
        error = PeerLost(f"{what}; {AGAIN}")
        reason = f"{type(error).__name__}: {error}"
        if tell:
            _tell(ExitCode.PEER_LOST, reason)
        _note(self._place, reason, ExitCode.PEER_LOST)
        explain(error)
        _end(ExitCode.PEER_LOST)


def _beats(me: int) -> list[tuple[str, str]]:
    """What process 0 hears of all, and what the others hear of it."""
    with suppress(jax.errors.JaxRuntimeError):  # it has said nothing yet, or is gone
        return store().key_value_dir_get(_ALIVE) if me == 0 else [("0", store().key_value_try_get(f"{_ALIVE}0"))]
    return []


def _silent(said: list[tuple[str, str]], heard: dict[str, tuple[str, int]]) -> str:
    """The number of a process that has said nothing new for too long, or nothing; `heard` is brought up to date."""
    beats = dict(said)
    for key in heard | beats:
        before, polls = heard.get(key, ("", 0))
        beat = beats.get(key, before)
        heard[key] = (beat, polls + 1 if beat == before != _LEFT else 0)
    return next((key.rpartition("/")[2] for key, (_, polls) in heard.items() if polls >= _SILENT_POLLS), "")


def _end_with(failure: dict[str, Any], place: RunDirectory | None) -> None:
    code, how = failure["exit_code"], ": " if failure["exit_code"] == ExitCode.STOPPED else " failed: "
    reason = f"process {failure['process']}{how}{failure['reason']}"
    _note(place, reason, code)
    print(f"exit {code}: {reason}", file=sys.stderr)
    _end(code)


def _note(place: RunDirectory | None, reason: str, code: int) -> None:
    if place is not None:  # an evaluation has no STATUS
        place.write_failure(reason, code)


def _read() -> dict[str, Any] | None:
    if jax.process_count() == 1:
        return None
    try:
        return json.loads(store().key_value_try_get(_KEY))
    except (jax.errors.JaxRuntimeError, AssertionError):  # nobody has failed, or the coordinator is gone
        return None


def end(exit_code: int) -> int:
    """The code to end with; at once where Orbax waits for a part of a save that failed, as Python would wait for it.

    That is five minutes (seen with 0.12.8), and jax's farewell gives up before.
    """
    if Together.left_behind:
        meet("leave")
        _end(exit_code)
    return exit_code


def _end(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(exit_code)


def _leave(exit_code: int) -> None:
    if jax.process_index() == 0 and jax.process_count() > 1:
        time.sleep(_LAST_SECONDS)  # the coordinator lives here: the others want to read the failure
    os._exit(exit_code)
