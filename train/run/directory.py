"""The run directory: config.yaml, config.input.yaml, env.json, STATUS, and where everything else lies in it."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.data.prepare import write_atomically
from mixtral_jax.train.config import Provenance, RunConfig, resolved_yaml
from mixtral_jax.train.errors import FULL, ExitCode, StorageError, UserError, failure_of
from mixtral_jax.train.run.environment import environment


class RunDirectory:
    """Files of one run on this machine. Only process 0 writes those that all processes share."""

    def __init__(self, path: Path):
        self.path = path
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

    def write_status(self, state: str, step: int, reason: str, exit_code: int | None) -> None:
        """One JSON object: state (running, done, preempted, diverged, failed), step, reason, exit_code."""
        if jax.process_index() == 0:
            status = {"state": state, "step": step, "reason": reason, "exit_code": exit_code}
            place, text = self.path / "STATUS", json.dumps(status) + "\n"
            try:
                write_atomically(place, text)
            except OSError as error:
                if error.errno not in FULL or not place.exists():
                    raise
                with place.open("r+") as file:  # no room for a second one: over the first
                    file.truncate(file.write(text))

    def write_failure(self, reason: str, exit_code: int, state: str = "failed") -> None:
        """Say in STATUS why this attempt ended, where it can be written; a refused one leaves what the run's says."""
        try:
            before = json.loads((self.path / "STATUS").read_text())
        except (OSError, ValueError):
            before = None
        if self.step is None and exit_code == ExitCode.USAGE:
            with contextlib.suppress(OSError):  # an attempt that was refused is none, unless it has files
                (self.attempts / str(self.attempt)).rmdir()
            if before is not None:
                return
        step = self.step if self.step is not None else (before or {}).get("step", 0)
        with contextlib.suppress(OSError):
            self.write_status(state, step, reason, exit_code)

    def forget_results(self) -> None:
        """A run that begins again leaves no metrics of the old one."""
        for file in (self.metrics, self.moe):
            file.unlink(missing_ok=True)
        for directory in (self.samples, self.tensorboard):
            for file in directory.glob("*"):
                file.unlink()
