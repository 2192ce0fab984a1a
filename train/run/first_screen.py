"""What a run says before it starts."""

import platform
from importlib import metadata
from typing import Any

import jax

from mixtral_jax.data.prepare.prepare import PreparedData
from mixtral_jax.kernels.attention import AttentionShape, resolve_attention
from mixtral_jax.kernels.grouped_matmul import resolve_matmul
from mixtral_jax.model import compute_dtype
from mixtral_jax.moe.transport import resolve_transport
from mixtral_jax.parallel.mesh import MESH_AXES
from mixtral_jax.train.checkpoints.checkpointer import Say
from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.hooks.throughput import peak_flops
from mixtral_jax.train.plan.dry_run import batch_line, human_bytes, memory_line, model_line
from mixtral_jax.train.plan.placement import axis_lines, passing_line


def first_screen(config: RunConfig, mesh: jax.sharding.Mesh | None, prepared: PreparedData, say: Say) -> None:
    """Versions, devices, mesh, kernels, size, batch, data, router coefficients."""
    devices = jax.devices()
    sizes = dict.fromkeys(MESH_AXES, 1) if mesh is None else dict(mesh.shape)
    kind = devices[0].device_kind
    peak = peak_flops(kind)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint"))
    rows = {
        "run": f"{config.run_dir} ({config.stage}, seed {config.seed})",
        "versions": f"python {platform.python_version()}, {versions}",
        "devices": f"{len(devices)} {kind} in {jax.process_count()} processes"
        + (f", {peak / 1e12:.0f} TFLOP/s each" if peak else ", no peak known: mfu is null"),
        "mesh": "one device" if mesh is None else " x ".join(f"{axis} {size}" for axis, size in sizes.items()),
        "kernels": kernels_line(config, sizes),
        "model": model_line(config.model, config.seq_len),
        "batch": batch_line(config, sizes),
        "memory": memory_line(config, sizes),
        "besides": passing_line(config, sizes),
        "data": f"{prepared.fingerprint}: {', '.join(s.name for s in prepared.train)}; {prepared.order.total:,} rows",
        "router": router_line(config),
    }
    for title, text in rows.items():
        say(f"{title:>8}  {text}")
        if title == "mesh":
            for line in axis_lines(sizes):
                say(f"{'':>8}    {line}")


def kernels_line(config: RunConfig, sizes: dict[str, int]) -> str:
    """What `auto` chose on this machine."""
    compute, length, backend = config.compute, config.seq_len, jax.default_backend()
    dtype = compute_dtype(compute.dtype)
    shape = AttentionShape(length // sizes["context"], length, config.model.head_dim, dtype.name, sizes["context"] == 1)
    return (
        f"attention {resolve_attention(compute.attention, backend, shape)}, "
        f"experts {resolve_matmul(compute.moe.matmul, backend)}, "
        f"transport {resolve_transport(compute.moe.transport, sizes['expert'])}, {dtype}, remat {compute.remat}"
    )


def router_line(config: RunConfig) -> str:
    """The coefficients that are in force."""
    if config.model.is_dense:
        return "none: a dense model"
    router = config.router
    capacity = config.compute.moe.capacity_factor
    return (
        f"balance loss {router.balance_loss} x {router.router_aux_loss_coef:g}, "
        f"z-loss x {router.router_z_loss_coef:g}; "
        + ("dropless" if capacity is None else f"capacity factor {capacity:g}: tokens can be dropped")
    )


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
