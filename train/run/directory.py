"""The run directory: config.yaml, config.input.yaml, env.json, STATUS, and where everything else lies in it."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.train.commands.doctor import installed
from mixtral_jax.train.config.load import Provenance, resolved_yaml
from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.errors import UserError


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
            raise UserError(f"output_dir: {self.path} is not writable: {error.strerror or error}") from error

    def describe(self, config: RunConfig, provenance: Provenance | None, mesh: jax.sharding.Mesh | None) -> None:
        """Write what the run is made of: the resolved configuration, the one that was given, and the environment."""
        if jax.process_index() != 0:
            return
        replace_text(self.path / "config.yaml", resolved_yaml(config))
        if provenance is not None:
            overrides = "".join(f"# override: {override}\n" for override in provenance.overrides)
            replace_text(self.path / "config.input.yaml", overrides + provenance.text)
        replace_text(self.path / "env.json", json.dumps(environment(mesh), indent=2) + "\n")

    def write_status(self, state: str, step: int, reason: str, exit_code: int | None) -> None:
        """One JSON object: state (running, done, preempted, diverged, failed), step, reason, exit_code."""
        if jax.process_index() == 0:
            status = {"state": state, "step": step, "reason": reason, "exit_code": exit_code}
            replace_text(self.path / "STATUS", json.dumps(status) + "\n")

    def forget_results(self) -> None:
        """A run that begins again leaves no metrics of the old one."""
        for file in (self.metrics, self.moe):
            file.unlink(missing_ok=True)
        for directory in (self.samples, self.tensorboard):
            for file in directory.glob("*"):
                file.unlink()


def environment(mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """Versions, git commit, flags, devices and mesh: what one needs to explain a number later."""
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return {
        "versions": {"python": platform.python_version(), **installed()},
        "git": git_commit(),
        "command": sys.argv,
        "flags": {k: v for k, v in os.environ.items() if k in flags or k.startswith(("JAX_", "NCCL_"))},
        "platform": platform.platform(),
        "processes": jax.process_count(),
        "devices": [f"{d.id}: {d.device_kind}" for d in jax.devices()],
        "mesh": None if mesh is None else dict(mesh.shape),
    }


def git_commit() -> str | None:
    """The commit of this source tree, with + where it was changed; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "") if commit.returncode == 0 else None


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
