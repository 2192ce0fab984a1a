"""What a run depends on outside its configuration: versions, source, flags, devices."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "array-record", "numpy",
    "sentencepiece", "tokenizers", "pydantic", "ruamel.yaml", "tensorflow-datasets", "wandb", "libtpu", "tokamax",
    "jax-cuda13-plugin",
)  # fmt: skip
OPTIONAL = ("libtpu", "tokamax", "jax-cuda13-plugin")


def installed() -> dict[str, str | None]:
    """Version of every package that matters; None where it is absent."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """Versions, git commit, flags, devices and mesh: what one needs to explain a number later."""
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
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
    describe = [*git, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
