"""Two threads that look after a run: one keeps STATUS fresh for those outside, one ends it where nothing moves."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from typing import Self

import jax

from mixtral_jax.train.errors import ExitCode
from mixtral_jax.train.hooks import LogConfig, Watchdog, limits_of
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.peers import end_all

BEAT_SECONDS = 10.0
_PATIENCE = 0.2  # seconds that a change of the state waits for STATUS to say it


@contextlib.contextmanager
def watch(place: RunDirectory, log: LogConfig) -> Iterator[None]:
    """Meanwhile STATUS is kept fresh, from the beginning of the attempt on, and the watchdog watches."""
    limits = limits_of(log.watchdog_seconds, log.phase_seconds)
    bite = partial(end_all, ExitCode.WATCHDOG, place=place)
    with contextlib.closing(Watchdog(limits, place.phases, bite)), Heartbeat(place):
        yield


class Heartbeat:
    """While entered, process 0 rewrites STATUS at every change of the state, and at least every BEAT_SECONDS.

    It has a thread of its own: a disk that is full, or that does not answer, neither ends the run nor holds it up.
    """

    def __init__(self, place: RunDirectory):
        self._place, self._turn = place, threading.Condition()
        self._changes, self._told, self._ended = 0, 0, False
        self._keeps_up = True  # whether the last change was told in time
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._thread.start()
            self._place.phases.changed = self._change
            self._change()
        return self

    def __exit__(self, *_: object) -> None:
        self._place.phases.changed = lambda: None
        self._ended = True
        self._change()
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE)

    def _change(self) -> None:
        with self._turn:
            self._changes += 1
            number = self._changes
            self._turn.notify_all()
            if self._keeps_up and not self._ended:
                self._keeps_up = self._turn.wait_for(lambda: self._told >= number, _PATIENCE)

    def _beat(self) -> None:
        while not self._ended:
            number = self._changes
            with contextlib.suppress(Exception):  # whatever is wrong, the run goes on, and the next beat tries again
                self._place.beat()
            with self._turn:
                self._told, self._keeps_up = number, True
                self._turn.notify_all()
                self._turn.wait_for(partial(self._has_news, number), BEAT_SECONDS)

    def _has_news(self, number: int) -> bool:
        return self._ended or self._changes > number
