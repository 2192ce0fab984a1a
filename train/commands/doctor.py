"""Is this machine fit to train? Versions, devices, kernels, known-bad pairs, disk."""

import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mixtral_jax.kernels import AttentionShape, choose_attention, choose_matmul, native_bf16
from mixtral_jax.parallel import Machine, machine
from mixtral_jax.parallel.compiler_quirks import breaks_on_bf16
from mixtral_jax.train.plan import has_cuda_plugin, has_libtpu
from mixtral_jax.train.run import OPTIONAL, installed

SMALLEST_FREE_GIB = 5


def examine(directory: str | Path = ".") -> int:
    """Print the findings; 0 where a run can start, 2 where something stands in its way."""
    console = Console(highlight=False, soft_wrap=True)
    versions = installed()
    problems = [*known_bad(versions, libtpu_of_jax()), *disk_problems(Path(directory))]
    console.print(f"[bold]python[/] {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    console.print(
        "[bold]packages[/] " + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    )
    problems += [f"{name} is not installed" for name, v in versions.items() if v is None and name not in OPTIONAL]
    lines, device_problems = devices()
    problems += device_problems
    for line in lines:
        console.print(f"[bold]devices[/] {line}")
    if lines:
        found, missing = kernels(machine())
        problems += missing
        for name, finding in found.items():
            console.print(f"[bold]kernel[/] {name}: {escape(finding)}")
    console.print(
        f"[bold]disk[/] {shutil.disk_usage(directory).free / 2**30:.1f} GiB free in {Path(directory).resolve()}"
    )
    for problem in problems:
        console.print(f"[red]problem[/] {escape(problem)}", markup=True)
    console.print("doctor: a run can start" if not problems else f"doctor: {len(problems)} problems, named above")
    return 2 if problems else 0


def libtpu_of_jax() -> str | None:
    """The libtpu that the installed jax's own extra names, `0.0.50` of `libtpu==0.0.50.*`; None without jax."""
    try:
        named = re.search(r"libtpu==([\d.]+)\.\*", " ".join(metadata.requires("jax") or ()))
    except metadata.PackageNotFoundError:
        return None
    return named and named[1]


def known_bad(versions: Mapping[str, str | None], named_libtpu: str | None = None) -> list[str]:
    """Combinations that are known to fail, each with its remedy."""
    jax, flax, jaxlib, libtpu = (parsed(versions.get(name)) for name in ("jax", "flax", "jaxlib", "libtpu"))
    orbax = parsed(versions.get("orbax-checkpoint"))
    found = []
    if jax and jaxlib and jax[:2] != jaxlib[:2]:
        found.append(f"jax {versions['jax']} with jaxlib {versions['jaxlib']}: install one release of both")
    if jax >= (0, 11, 2) and flax and flax <= (0, 12, 9):
        found.append(f"flax {versions['flax']} fails to import on jax {versions['jax']}: install 'flax>=0.12.10'")
    if jax in ((0, 11, 0), (0, 11, 1)) and versions.get("jax-cuda13-plugin"):
        found.append(f"jax {versions['jax']} gives wrong values on some GPUs with CUDA 13: install 'jax>=0.11.2'")
    if jax and jax < (0, 10, 2):
        found.append(f"jax {versions['jax']} is older than 0.10.2, the first that this project runs on")
    if orbax and orbax < (0, 12, 8):
        found.append(f"orbax-checkpoint {versions['orbax-checkpoint']} has another v1 interface: install '>=0.12.8'")
    if libtpu and jax and named_libtpu and libtpu[:3] != parsed(named_libtpu):
        found.append(
            f"libtpu {versions['libtpu']} is not the one that jax {versions['jax']} names: install {named_libtpu}.*"
        )
    return found


def parsed(version: str | None) -> tuple[int, ...]:
    """`0.12.8` -> (0, 12, 8); what is no number ends it; () where absent."""
    numbers: list[int] = []
    for part in (version or "").split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def devices() -> tuple[list[str], list[str]]:
    """What jax sees, and a first computation on it; (lines, problems)."""
    try:
        import jax
        import jax.numpy as jnp

        answer = float(jnp.ones((8, 8)).sum())
    except Exception as error:  # whatever a broken driver raises is what the user came to see
        return [], [f"jax cannot compute: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    products = ", with products of bfloat16" if native_bf16() and jax.default_backend() == "cpu" else ""
    lines = [f"{jax.device_count()} x {jax.default_backend()} ({kinds}{products})"]
    if products and breaks_on_bf16():
        lines.append("this jaxlib ends at bfloat16 of a few odd shapes; XLA_FLAGS=--xla_cpu_max_isa=AVX512 avoids it")
    return lines, [] if answer == 64.0 else [f"the sum of 64 ones came out as {answer} on {kinds}"]


def kernels(machine: Machine) -> tuple[dict[str, str], list[str]]:
    """What `auto` stands for on such a machine, and why; and what keeps a run from starting there."""
    row = AttentionShape(4096, 4096, 128, "bfloat16")
    rows = {
        "attention": row,
        "attention in float32": row._replace(dtype="float32"),
        "attention with mesh.context": row._replace(part=True),
    }
    found = {name: choose_attention("auto", machine, shape) for name, shape in rows.items()}
    problems = []
    try:
        found["grouped matmul"] = choose_matmul("auto", machine)
    except ValueError as error:
        problems.append(str(error))
    lines = {name: f"{choice.kernel} ({choice.why})" for name, choice in found.items()}
    for name, there, extra in (("TPU slices", has_libtpu(), "aot"), ("GPUs", has_cuda_plugin(), "aot-gpu")):
        lines[f"plan for {name}"] = "available" if there else f"needs the extra `{extra}`"
    return lines, problems


def disk_problems(directory: Path) -> list[str]:
    """Too little room, or a directory that cannot be written."""
    found = []
    free = shutil.disk_usage(directory).free / 2**30
    if free < SMALLEST_FREE_GIB:
        found.append(f"only {free:.1f} GiB free in {directory.resolve()}: a run wants {SMALLEST_FREE_GIB}")
    if not os.access(directory, os.W_OK):
        found.append(f"{directory.resolve()} is not writable: choose another working directory or output_dir")
    return found
