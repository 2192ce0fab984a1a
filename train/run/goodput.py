"""The account of this attempt among those of the run: <run>/attempts/goodput.jsonl, an object for each."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from mixtral_jax.data.prepare import write_atomically
from mixtral_jax.train.attempts import Book, add_up, read_attempts
from mixtral_jax.train.phases import Phases


class Goodput:
    """The attempts of a run, this one among them."""

    def __init__(self, path: Path, phases: Phases):
        self.path, self._phases = path, phases
        self._before = ""
        self._earlier: list[dict[str, Any]] = []
        self._number: int | None = None

    def begin(self, number: int) -> None:
        """From here on this is an attempt, with this number."""
        self._earlier = read_attempts(self.path)
        self._before = "".join(json.dumps(attempt) + "\n" for attempt in self._earlier)
        self._number = number

    def account(self, first: int, last: int, exit_code: int | None, undone: int = 0) -> Book:
        """Write down how far this attempt has come, where it can be written, and add up all of them.

        Args:
            first, last: the step that it began from, and the one that it did last.
            exit_code: None while it goes on.
            undone: steps that it took back, beside those up to `last`.
        """
        if self._number is None:
            return add_up(read_attempts(self.path))
        reading = self._phases.read()
        own = {
            "attempt": self._number, "host": socket.gethostname(), "pid": os.getpid(), "exit_code": exit_code,
            "job_start_time": self._phases.began_at, **reading.events,
            "first_step": first, "step_count": last, "undone": undone,
            # by the clock of this attempt, which nobody sets
            "job_end_time": self._phases.began_at + sum(reading.seconds.values()),
            "seconds": {kind: round(seconds, 3) for kind, seconds in reading.seconds.items()},
        }  # fmt: skip
        with contextlib.suppress(OSError):
            write_atomically(self.path, f"{self._before}{json.dumps(own)}\n")
        return add_up([*self._earlier, own])

    @property
    def begun(self) -> bool:
        """Whether this is an attempt."""
        return self._number is not None

    def forget(self) -> None:
        """This attempt was refused: it is none."""
        if self.begun:
            self._number = None
            write_atomically(self.path, self._before)
