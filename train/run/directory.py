"""The run directory: config.yaml, config.input.yaml, env.json, STATUS, and where everything else lies in it."""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixtral_jax.data.prepare import replace_or_overwrite, write_atomically
from mixtral_jax.train.config import Provenance, RunConfig, resolved_yaml
from mixtral_jax.train.errors import ExitCode, StorageError, UserError, failure_of
from mixtral_jax.train.meetings import hear
from mixtral_jax.train.phases import Phase, Phases
from mixtral_jax.train.report import promise_page, write_page
from mixtral_jax.train.run import lease
from mixtral_jax.train.run.account import Account
from mixtral_jax.train.run.environment import environment
from mixtral_jax.train.run.goodput import Goodput
from mixtral_jax.train.run_files import json_object, last_attempt

_IN_ORDER = (ExitCode.DONE, ExitCode.NOT_FINITE, ExitCode.STOPPED)  # how a run ends that has not failed
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
        self.attempt = last_attempt(self.path)  # the number of this one, once it has begun; before, the last
        self.step: int | None = None  # that this attempt has come to; None: it has not begun
        self.account: Account | None = None  # where it stands in its data
        self.start, self.undone = 0, 0  # the step that it began from, and how many it took back
        self.replaces = False  # an old run lies here still, for which this attempt has no word
        self.resumed_from: dict[str, Any] | None = None  # the run and the step that it began with (resume_from)
        self._leases: list[lease.Lease] = []
        self._before: str | None = None  # what STATUS said when this attempt began
        self._lock, self.ended = threading.RLock(), False
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
            raise _refused("output_dir", self.path, error) from error
        if (self.path / "STATUS").is_dir():
            raise UserError(f"output_dir: {self.path / 'STATUS'} is a directory, and a run says there how it stands")

    def holds_a_run(self) -> bool:
        """Whether there is more than the log of this attempt, and of those that were refused."""
        return any(not p.name.startswith(("logs", "launch", lease.FILE)) for p in self.path.iterdir())

    def hold(self, other: Path | None) -> list[str]:
        """Own it, and the other directory that the run writes to, until `release`; process 0 does so for all.

        Returns a sentence for each that was taken over.

        Raises:
            UserError: another process writes there.
        """
        said, places = list[str](), [self.path] if other in (None, self.path.resolve()) else [self.path, other]
        for place in places if jax.process_index() == 0 else ():
            held = lease.Lease(place, _lost)
            try:
                place.mkdir(parents=True, exist_ok=True)
                said.append(held.take())
            except OSError as error:
                raise _refused("output_dir" if place == self.path else "checkpoint.directory", place, error) from error
            self._leases.append(held)
        return list(filter(None, said))

    @property
    def handed_over(self) -> bool:
        """Whether a later attempt of this process has it now."""
        return any(held.handed_over for held in self._leases)

    def check_held(self) -> None:
        """Before a step and a save.

        Raises:
            UserError: a later attempt of this process has it now.
        """
        if self.handed_over:
            raise UserError(f"{self.path}: another Trainer of this process has begun on this run since: use that one")

    def release(self) -> None:
        """This attempt writes no more."""
        while self._leases:
            self._leases.pop().release()

    def move_aside(self, other: Path | None) -> list[str]:
        """Make room for a new run: one rename to <name>.old-N, and one of the other directory; what was done, in words.

        Raises:
            UserError: it cannot be done; then nothing is.
        """
        moved: list[tuple[Path, Path]] = []
        run = self.path.resolve() if self.path.is_symlink() else self.path  # what a link points to, and not the link
        places = [run, *([other] if other is not None and other.exists() else [])]
        for held in self._leases:  # each stands until its place is another, but writes no more
            held.stop() if held.directory in (self.path, *places) else held.release()
        for place in places:
            aside = free_name(place)
            try:
                os.rename(place, aside)
            except OSError as error:
                for before, after in reversed(moved):
                    os.rename(after, before)
                raise UserError(f"--force: {place} cannot be moved to {aside}: {error.strerror or error}") from error
            moved.append((place, aside))
        for place, aside in moved:
            place.mkdir()
            (aside / lease.FILE).unlink(missing_ok=True)
        self._leases.clear()
        self.create()
        self.hold(other)
        return [f"{before} was moved to {after}, and begins anew" for before, after in moved]

    def begin(self) -> None:
        """From here on this attempt has a number, one more than the last; all processes call this, again too."""
        if self.goodput.begun:
            return
        if self.replaces:
            self.attempt = 1
            return
        if jax.process_index() == 0:
            self.attempt = last_attempt(self.path) + 1
            (self.attempts / str(self.attempt)).mkdir(parents=True)
        self.attempt = int(hear(np.array(self.attempt), 0))  # the directory of another machine may be another one
        with contextlib.suppress(OSError, ValueError):
            self._before = (self.path / "STATUS").read_text()
        self.goodput.begin(self.attempt)
        self.phases.changed()

    def withdraw(self) -> None:
        """This attempt is none: it was refused, or nothing is left to do."""
        if not self.goodput.begun or jax.process_index() != 0:
            return
        with self._lock:
            with contextlib.suppress(OSError):  # unless it has files
                (self.attempts / str(self.attempt)).rmdir()
            self.goodput.forget()
            self.attempt = last_attempt(self.path)

    def describe(self, config: RunConfig, provenance: Provenance | None, mesh: jax.sharding.Mesh | None) -> None:
        """Write what the attempt is made of: the resolved configuration, the one that was given, the environment."""
        if jax.process_index() != 0:
            return
        changed = config.model_dump(mode="json", exclude_defaults=True)
        known = environment(mesh) | {"resumed_from": self.resumed_from, "changed_settings": changed}
        files = {"config.yaml": resolved_yaml(config), "env.json": json.dumps(known, indent=2) + "\n"}
        if provenance is not None:
            overrides = "".join(f"# override: {override}\n" for override in provenance.overrides)
            files["config.input.yaml"] = overrides + provenance.text
        (self.attempts / str(self.attempt)).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            for place in (self.attempts / str(self.attempt), self.path):  # the run's own are those of the last attempt
                write_atomically(place / name, text)

    def beat(self) -> None:
        """Say in STATUS what this attempt is doing, until it says how it ended."""
        with self._lock:
            if self.goodput.begun and not self.ended:
                self.write_status(self.phases.state, self._reached, "", None)

    def write_status(self, state: str, step: int, reason: str, exit_code: int | None) -> list[str]:
        """One JSON object: state, step, time (seconds since 1970), host, attempt, goodput, reason, exit_code and more.

        `seconds` says where the time of all attempts went. Returns that as lines to read, on process 0.
        With an exit code the attempt ends, and another line promises the run's page.

        Raises:
            OSError: it cannot be written.
        """
        if jax.process_index() != 0 or self.replaces or self.handed_over:
            return []
        with self._lock:
            account = self.goodput.account(self.start, max(self.start, self.step or 0), exit_code, self.undone)
            status = {
                "state": state, "step": step, "time": round(time.time(), 3), "host": socket.gethostname(),
                "attempt": self.attempt, "seconds_since_progress": round(self.phases.read().idle, 3),
                "goodput": account.goodput, "seconds": account.seconds,
                "data": self._said("data", {}) if self.account is None else self.account.last,
                "reason": reason, "exit_code": exit_code,
            }  # fmt: skip
            replace_or_overwrite(self.path / "STATUS", json.dumps(status) + "\n")
            self.ended |= exit_code is not None
        return [*account.table(), *([] if exit_code is None else [promise_page(self.path)])]

    def leave_page(self) -> None:
        """The run's page, once STATUS says how this attempt ended; it takes seconds: behind all that others wait for.

        Why there is none stands in the log.
        """
        if self.ended and (failure := write_page(self.path)):
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as log:
                log.write(f"{failure}\n")

    @property
    def _reached(self) -> int:
        """The step of this attempt, and before its first one that of STATUS."""
        return self._said("step", 0) if self.step is None else self.step

    def _said(self, key: str, default: Any) -> Any:
        """What STATUS says now, if it is of the same type as the default."""
        said = json_object(self.path / "STATUS").get(key)
        return said if isinstance(said, type(default)) else default

    def write_failure(self, reason: str, exit_code: int) -> None:
        """Say in STATUS why this attempt ended, where it can be written, and let go of the run.

        A refused one leaves what the run's says, and so does one of a run that another process has. An end in order
        stands, whatever comes behind it.
        """
        if jax.process_index() == 0:
            with contextlib.suppress(OSError), self._lock:
                in_order = self.ended and self._said("exit_code", -1) in _IN_ORDER
                if not (in_order or self._is_taken_back(exit_code) or lease.is_of_others(self.path)):
                    self.write_status(_STATES.get(ExitCode(exit_code), "failed"), self._reached, reason, exit_code)
        self.release()

    def _is_taken_back(self, exit_code: int) -> bool:
        """Whether this attempt was refused, and so is none: STATUS says what it did before, where there was one."""
        if self.step is not None or exit_code != ExitCode.USAGE:
            return False
        if not self.goodput.begun:  # its number is that of the last one, which may be under way
            return (self.path / "STATUS").exists()
        self.withdraw()
        if self._before is None:
            return False
        replace_or_overwrite(self.path / "STATUS", self._before)
        return True

    def forget_results(self) -> None:
        """A run that begins again leaves no metrics of an attempt that came to no checkpoint."""
        for file in (self.metrics, self.moe, *self.samples.glob("*.jsonl"), *self.tensorboard.glob("*.tfevents.*")):
            file.unlink(missing_ok=True)

    def set_results_aside(self, step: int) -> list[str]:
        """Samples, evaluations and routing of steps behind `step`, which will be those of others; what was done."""
        found = [each for kind in ("samples", "eval", "routing") for each in sorted((self.path / kind).glob("*"))]
        later = [each for each in found if each.stem.isdigit() and int(each.stem) > step]
        if not later:
            return []
        aside = free_name(self.path / "results")
        for each in later:
            (aside / each.parent.name).mkdir(parents=True, exist_ok=True)
            os.rename(each, aside / each.parent.name / each.name)
        return [f"samples and evaluations of later steps were moved to {aside}"]


def _refused(key: str, place: Path, error: OSError) -> UserError:
    kind = StorageError if failure_of(error).exit_code == ExitCode.STORAGE else UserError
    return kind(f"{key}: {place} is not writable: {error.strerror or error}")


def free_name(place: Path) -> Path:
    """The first <name>.old-N that nothing has."""
    names = (place.with_name(f"{place.name}.old-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _lost(sentence: str) -> None:
    """From the thread of a lease: what the main thread is at must not be finished."""
    sys.stdout.flush()
    print(f"exit {ExitCode.PEER_LOST}: {sentence}", file=sys.stderr, flush=True)
    os._exit(ExitCode.PEER_LOST)
