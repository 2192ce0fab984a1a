"""What a run says before it starts, and all that can be said without making a weight."""

import platform
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from mixtral_jax.config import MixtralConfig
from mixtral_jax.data.prepare import PreparedData
from mixtral_jax.data.preview import mixture_lines
from mixtral_jax.data.rows import Position
from mixtral_jax.kernels import native_bf16
from mixtral_jax.model import compute_dtype, reduce_dtype
from mixtral_jax.moe import resolve_transport
from mixtral_jax.parallel.compiler_quirks import breaks_on_bf16
from mixtral_jax.train.checkpoints import Say
from mixtral_jax.train.config import Provenance, RunConfig, check_sizes, resolved_yaml
from mixtral_jax.train.meetings import meet
from mixtral_jax.train.memory import drop_freed_memory
from mixtral_jax.train.plan import axis_lines, human_bytes, memory_line, passing_line, peak_flops, useful_per_token
from mixtral_jax.train.run.check import kernels_of, sizes_of, tasks_of
from mixtral_jax.train.run.resume import changed_since, survey
from mixtral_jax.train.run.xla_flags import line as flags_line
from mixtral_jax.train.run.xla_flags import set_xla_flags


def dry_run(config: RunConfig, provenance: Provenance | None = None, *, force: bool = False) -> int:
    """Print everything that can be known before anything is built; what the run would refuse at its start is refused.

    Raises:
        ValueError: the mesh does not fit the devices of this machine; see also `survey`.
    """
    print(resolved_yaml(config, provenance), end="")
    set_xla_flags(config.compute.xla_flags)
    devices = jax.devices()
    sizes = config.mesh.sizes(len(devices))
    found, _, notes = survey(config, force, lambda: sizes, print, finished=True)
    tasks_of(config)
    for line in changed_since(found, config):
        print(f"  changed {line}")
    rows = {
        "model": "; ".join([model_line(config.model, useful_per_token(config)), *notes]),
        "mesh": f"{mesh_line(sizes)} on {len(devices)} {devices[0].device_kind}",
        "kernels": "; ".join([kernels_line(config, sizes), *fallback_lines(config, sizes)]),
        "flags": flags_line(config.compute.xla_flags),
        "batch": batch_line(config, sizes),
        "memory": memory_line(config, sizes),
        "writes": str(config.run_dir),
    }
    for title, text in rows.items():
        print(f"{title:>8}  {text}")
    return 0


def first_screen(
    config: RunConfig, mesh: jax.sharding.Mesh | None, prepared: PreparedData, start: Position, say: Say
) -> None:
    """Versions, devices, mesh, kernels, size, batch, data, router coefficients."""
    devices = jax.devices()
    sizes = sizes_of(mesh)
    kind = devices[0].device_kind
    peak = peak_flops(kind)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    rows = {
        "run": f"{config.run_dir} ({config.stage}, seed {config.seed})",
        "versions": f"python {platform.python_version()}, {versions}",
        "devices": f"{len(devices)} {kind} in {jax.process_count()} processes"
        + (f", {peak / 1e12:.0f} TFLOP/s each" if peak else ", no peak known: mfu is null"),
        "mesh": "one device" if mesh is None else mesh_line(sizes),
        "kernels": kernels_line(config, sizes),
        "flags": flags_line(config.compute.xla_flags),
        "model": model_line(config.model, useful_per_token(config)),
        "batch": batch_line(config, sizes),
        "memory": memory_line(config, sizes),
        "besides": passing_line(config, sizes, jax.default_backend()),
        "data": f"{prepared.fingerprint}: {', '.join(prepared.sources)}; {sum(s.rows for s in prepared.train):,} rows",
        "router": router_line(config),
    }
    read = [f"{s.name}: {s.documents:,} documents, {s.rows:,} rows of {s.described}" for s in prepared.train]
    read += [f"validation/{s.name}: {s.documents:,} documents of {s.described}" for s in prepared.validation]
    mixed = mixture_lines(prepared, config.steps, config.global_batch_size, start)
    below = {
        "mesh": axis_lines(sizes),
        "kernels": fallback_lines(config, sizes),
        "data": [*read, *prepared.readings(), *mixed],
    }
    for title, text in rows.items():
        say(f"{title:>8}  {text}")
        for line in below.get(title, ()):
            say(f"{'':>8}    {line}")


def model_line(model: MixtralConfig, flops: float) -> str:
    """Parameters in all and used by a token, and the useful FLOPs of a token in this stage."""
    return (
        f"{model.num_params():,} parameters, {model.num_active_params():,} used by a token; "
        f"{flops / 1e9:.4g} useful GFLOP a token"
    )


def mesh_line(sizes: Mapping[str, int]) -> str:
    """The size of every axis."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def batch_line(config: RunConfig, sizes: dict[str, int]) -> str:
    """How the global batch is divided.

    Raises:
        ValueError: the mesh does not divide the run, the micro-batch for one.
    """
    check_sizes(config, sizes)
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    rows = config.rows_per_micro_batch
    length = f"{config.tokens_per_step * config.steps:,} in {config.steps:,} steps"
    return (
        f"{config.global_batch_size} sequences = {config.accumulation} micro-batches x {shards} shards x "
        f"{rows // shards} sequences; {config.tokens_per_step:,} tokens a step, "
        f"{length if config.steps else f'for {config.data.epochs:g} epochs'}"
    )


def kernels_line(config: RunConfig, sizes: dict[str, int]) -> str:
    """What runs on this machine, and in which precision."""
    compute = config.compute
    chosen = ", ".join(f"{name} {choice.kernel}" for name, choice in kernels_of(config, sizes).items())
    factor = compute.moe.buffer_factor
    buffer = "" if factor is None else f" in buffers of {factor:g} times an even load"
    return (
        f"{chosen}, transport {resolve_transport(compute.moe.transport, sizes['expert'])}{buffer}, "
        f"{compute_dtype(compute.dtype)}, gradients over devices in {reduce_dtype(compute)}, remat {compute.remat}"
    )


def fallback_lines(config: RunConfig, sizes: dict[str, int]) -> list[str]:
    """One for each kernel that is not the fastest of this kind of machine: why."""
    chosen = kernels_of(config, sizes).items()
    lines = [f"note: {name} falls back on {choice.kernel}: {choice.why}" for name, choice in chosen if choice.fallback]
    native = jax.default_backend() == "cpu" and native_bf16() and not breaks_on_bf16()
    if native and config.compute.dtype == "auto":
        lines.append("note: this processor has products of bfloat16: compute.dtype=bfloat16 makes wide models faster")
    return lines


def router_line(config: RunConfig) -> str:
    """The coefficients that are in force."""
    if config.model.is_dense:
        return "none: a dense model"
    router = config.router
    capacity, order = config.compute.moe.capacity_factor, config.compute.moe.capacity_order
    return (
        f"balance loss {router.balance_loss} x {router.router_aux_loss_coef:g}, "
        f"z-loss x {router.router_z_loss_coef:g}; "
        + ("dropless" if capacity is None else f"capacity factor {capacity:g}: rows past it are dropped, by {order}")
    )


def compiled(step: Any, *arguments: Any, say: Say) -> tuple[Any, float]:
    """The program of a jitted step for these arguments, and the seconds; no process goes on before all have theirs."""
    began = time.perf_counter()
    program = step.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    drop_freed_memory()
    say(f"compiled  {compiled_line(program, seconds)}")
    meet("compiled")
    return program, seconds


def compiled_line(program: Any, seconds: float) -> str:
    """What the compiler says of the training step's memory on one device."""
    stats = program.memory_analysis()
    if stats is None:
        return f"in {seconds:.1f} s; this backend says nothing of its memory"
    held = human_bytes(stats.argument_size_in_bytes)
    return (
        f"in {seconds:.1f} s; a device holds {held} of state and batch, and beside them activations, gradients and "
        f"gathered weights of {human_bytes(stats.temp_size_in_bytes)} at once"
    )
