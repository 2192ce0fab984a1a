"""Compiler flags that let communication run beside compute, put into the environment before jax starts its devices.

Names are checked against the pinned compilers by tests/train/test_xla_flags.py: XLA ends a process that names a flag
that it does not know. What the user's own environment says of a flag stands.
"""

import glob
import os
import re
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from typing import Literal, NamedTuple

from mixtral_jax.train.errors import UserError


class Flags(NamedTuple):
    """What `auto` sets on a platform, and the variable that its compiler reads."""

    variable: str
    auto: tuple[str, ...]


FLAGS = {
    # gathers and scatters of one layer's weights start while another computes, and cross the loop over layers
    "cuda": Flags("XLA_FLAGS", (
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
    )),
    # collectives become asynchronous, are fused with the products beside them, and span several of them
    "tpu": Flags("LIBTPU_INIT_ARGS", (
        "--xla_enable_async_all_gather=true",
        "--xla_tpu_enable_async_all_to_all=true",
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    )),
}  # fmt: skip
NONE = Flags("XLA_FLAGS", ())
_DEVICES = {"cuda": ("/dev/nvidia[0-9]*",), "tpu": ("/dev/accel*", "/dev/vfio/[0-9]*")}
_TRY = "from jax._src.lib import xla_client; xla_client.make_cpu_client()"

Choice = Literal["auto"] | Sequence[str]


def platform_ahead(env: MutableMapping[str, str]) -> str:
    """Which platform jax will start, as far as one can tell without starting it."""
    named = env.get("JAX_PLATFORMS", "").split(",")[0]
    if named:
        return "cuda" if named == "gpu" else named
    return next((name for name, places in _DEVICES.items() if any(map(glob.glob, places))), "cpu")


def set_xla_flags(choice: Choice, env: MutableMapping[str, str] = os.environ, platform: str | None = None) -> None:
    """Add the flags that the environment does not name yet; nothing where jax has started, which `line` then says.

    Args:
        platform: that is compiled for, cuda or tpu, where it is not the one that jax will start.

    Raises:
        UserError: XLA does not know one of a list.
    """
    variable, missing = _missing(choice, env, platform)
    if not missing or started():
        return
    flags = f"{env.get(variable, '')} {' '.join(missing)}".strip()
    if choice != "auto" and variable == "XLA_FLAGS":  # TPU's are known by libtpu alone, which takes the chips to answer
        tried = {**env, variable: flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TRY], env=tried, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            said = re.search(r"Unknown flag.*", done.stderr) or re.search(r".*\s*$", done.stderr)
            raise UserError(f"compute.xla_flags: XLA refuses {' '.join(missing)}: {said[0] if said else 'silently'}")
    env[variable] = flags


def line(choice: Choice, env: MutableMapping[str, str] = os.environ) -> str:
    """For the first screen: the variable and all that it holds; or what came too late."""
    variable, missing = _missing(choice, env)
    text = f"{variable}={env.get(variable, '')}" if env.get(variable) else "none"
    if missing:
        text += f"; too late for {' '.join(missing)}, as jax had started: put them into {variable} before that"
    return text


def started() -> bool:
    """Whether jax has looked for its devices, after which flags are read no more."""
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # has no public name

    return xla_bridge.backends_are_initialized()


def _missing(choice: Choice, env: MutableMapping[str, str], platform: str | None = None) -> tuple[str, list[str]]:
    variable, auto = FLAGS.get(platform or platform_ahead(env), NONE)
    there = {flag.partition("=")[0] for flag in env.get(variable, "").split()}
    return variable, [flag for flag in (auto if choice == "auto" else choice) if flag.partition("=")[0] not in there]
