"""The run directory: config.yaml, config.input.yaml, env.json, STATUS, and where everything else lies in it."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.data.prepare import write_atomically
from mixtral_jax.train.config import Provenance, RunConfig, resolved_yaml
from mixtral_jax.train.errors import FULL, ExitCode, StorageError, UserError, failure_of
from mixtral_jax.train.phases import Phase, Phases
from mixtral_jax.train.run.environment import environment
from mixtral_jax.train.run.goodput import Goodput

_STATES = {ExitCode.WATCHDOG: "watchdog", ExitCode.STOPPED: "preempted"}  # of attempts that were ended; others: failed


class RunDirectory:
    """Files of one run on this machine. Only process 0 writes those that all processes share."""

    def __init__(self, path: Path, began: float | None = None):
        """`began`: of time.monotonic(), when the process did."""
        self.path, self.phases = path, Phases(began)
        self.metrics = path / "metrics.jsonl"
        self.moe = path / "moe.jsonl"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.profile = path / "profile"
        self.log = path / "logs" / f"process_{jax.process_index()}.log"
        self.checkpoints = path / "checkpoints"
        self.attempts = path / "attempts"
        self.attempt = max(self._numbers(), default=0)  # the number of this one, once it has begun; before, the last
        self.step: int | None = None  # that this attempt has come to; None: it has not begun
        self.start = 0  # the step that it began from
        self._before: str | None = None  # what STATUS said when this attempt began
        self._lock, self._ended = threading.RLock(), False
        self.goodput = Goodput(self.attempts / "goodput.jsonl", self.phases)
        self.phases.become(Phase.PREPARING)  # process_index has found the devices

    def create(self) -> None:
        """Make it.

        Raises:
            UserError: it cannot be written to.
        """
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable_{jax.process_index()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            kind = StorageError if failure_of(error).exit_code == ExitCode.STORAGE else UserError
            raise kind(f"output_dir: {self.path} is not writable: {error.strerror or error}") from error

    def begin(self) -> None:
        """Nothing is left to refuse: from here on this attempt has a number, one more than the last; all call this."""
        if jax.process_index() == 0:
            self.attempt = max(self._numbers(), default=0) + 1
            (self.attempts / str(self.attempt)).mkdir(parents=True)
        if jax.process_count() > 1:  # the directory of another machine may be another one
            self.attempt = int(multihost_utils.broadcast_one_to_all(np.int32(self.attempt)))
        with contextlib.suppress(OSError):
            self._before = (self.path / "STATUS").read_text()
        self.goodput.begin(self.attempt)
        self.phases.changed()

    def _numbers(self) -> list[int]:
        return [int(p.name) for p in self.attempts.glob("*") if p.name.isdecimal()]

    def describe(self, config: RunConfig, provenance: Provenance | None, mesh: jax.sharding.Mesh | None) -> None:
        """Write what the attempt is made of: the resolved configuration, the one that was given, the environment."""
        if jax.process_index() != 0:
            return
        files = {"config.yaml": resolved_yaml(config), "env.json": json.dumps(environment(mesh), indent=2) + "\n"}
        if provenance is not None:
            overrides = "".join(f"# override: {override}\n" for override in provenance.overrides)
            files["config.input.yaml"] = overrides + provenance.text
        for name, text in files.items():
            for place in (self.attempts / str(self.attempt), self.path):  # the run's own are those of the last attempt
                write_atomically(place / name, text)

    def beat(self) -> None:
        """Say in STATUS what this attempt is doing, until it says how it ended."""
        with self._lock:
            if self.goodput.begun and not self._ended:
                self.write_status(self.phases.state, self._reached, "", None)

    def write_status(self, state: str, step: int, reason: str, exit_code: int | None) -> list[str]:
        """One JSON object: state, step, time (seconds since 1970), host, attempt, goodput, reason, exit_code and more.

        `seconds` says where the time of all attempts went. Returns that as lines to read, on process 0.
        """
        if jax.process_index() != 0:
            return []
        with self._lock:
            self._ended |= exit_code is not None
            account = self.goodput.account(self.start, max(self.start, self.step or 0), exit_code)
            status = {
                "state": state, "step": step, "time": round(time.time(), 3), "host": socket.gethostname(),
                "attempt": self.attempt, "seconds_since_progress": round(self.phases.read().idle, 3),
                "goodput": account.goodput, "seconds": account.seconds, "reason": reason, "exit_code": exit_code,
            }  # fmt: skip
            self._replace_status(json.dumps(status) + "\n")
        return list(account.table())

    def _replace_status(self, text: str) -> None:
        place = self.path / "STATUS"
        try:
            write_atomically(place, text)
        except OSError as error:
            if error.errno not in FULL or not place.exists():
                raise
            with place.open("r+") as file:  # no room for a second one: over the first
                file.truncate(file.write(text))

    @property
    def _reached(self) -> int:
        """The step of this attempt, and before its first one that of STATUS."""
        if self.step is not None:
            return self.step
        try:
            return int(json.loads((self.path / "STATUS").read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def write_failure(self, reason: str, exit_code: int) -> None:
        """Say in STATUS why this attempt ended, where it can be written; a refused one leaves what the run's says."""
        if jax.process_index() != 0:
            return
        with contextlib.suppress(OSError), self._lock:
            if self.step is None and exit_code == ExitCode.USAGE:
                with contextlib.suppress(OSError):  # an attempt that was refused is none, unless it has files
                    (self.attempts / str(self.attempt)).rmdir()
                if not self.goodput.begun and (self.path / "STATUS").exists():
                    return
                self.goodput.forget()
                if self._before is not None:
                    self._ended = True
                    self._replace_status(self._before)
                    return
            self.write_status(_STATES.get(ExitCode(exit_code), "failed"), self._reached, reason, exit_code)

    def forget_results(self) -> None:
        """A run that begins again leaves no metrics of the old one."""
        for file in (self.metrics, self.moe, self.goodput.path):
            file.unlink(missing_ok=True)
        for directory in (self.samples, self.tensorboard):
            for file in directory.glob("*"):
                file.unlink()
