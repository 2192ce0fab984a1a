"""What a run would be: its configuration, size, mesh, memory and batch arithmetic, without making a weight."""

from collections.abc import Mapping

import jax
from rich.console import Console

from mixtral_jax.config import MixtralConfig
from mixtral_jax.train.config.load import Provenance, resolved_yaml
from mixtral_jax.train.config.schema import RunConfig, check_sizes
from mixtral_jax.train.plan.held import copied_by_device, held_by_device

# Bytes for each parameter: fp32 master weight, AdamW's two moments, accumulated gradient.
STATE_BYTES = {"parameters": 4, "optimizer": 8, "gradients": 4}


def dry_run(config: RunConfig, provenance: Provenance | None = None) -> int:
    """Print everything that can be known before anything is built.

    Raises:
        ValueError: the mesh does not fit the devices of this machine.
    """
    console = Console(highlight=False, soft_wrap=True)
    console.print(resolved_yaml(config, provenance), markup=False, end="")
    devices = jax.devices()
    sizes = config.mesh.sizes(len(devices))
    for title, text in (
        ("model", model_line(config.model, config.seq_len)),
        ("mesh", f"{' x '.join(f'{a} {n}' for a, n in sizes.items())} on {len(devices)} {devices[0].device_kind}"),
        ("batch", batch_line(config, sizes)),
        ("memory", memory_line(config, sizes)),
        ("writes", str(config.run_dir)),
    ):
        console.print(f"{title:>8}  {text}", markup=False)
    return 0


def model_line(model: MixtralConfig, seq_len: int) -> str:
    """Parameters in all and used by a token, and what a token costs."""
    flops = {kind: model.flops_per_token(seq_len, kind) / 1e9 for kind in ("causal", "full")}
    return (
        f"{model.num_params():,} parameters, {model.num_active_params():,} used by a token; "
        f"{flops['causal']:.4g} GFLOP a token forward + backward (causal; {flops['full']:.4g} counting all pairs)"
    )


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


def memory_line(config: RunConfig, sizes: Mapping[str, int]) -> str:
    """Bytes per device of what lives through the step; activations come on top."""
    from mixtral_jax.train.plan.closed_form import parts_of  # the closed form counts with held_by_device

    trained, frozen = held_by_device(config, sizes)
    each: dict[str, float] = {name: trained * size for name, size in STATE_BYTES.items()}
    if config.adapters is not None:
        each = {f"frozen base ({config.adapters.base_dtype})": frozen} | each
    if parts_of(config).copied:
        each["reference"] = copied_by_device(config, sizes)
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in each.items())
    shards = sizes["fsdp"] * sizes["expert"] * sizes["tensor"]
    return f"{human_bytes(sum(each.values()))} a device before activations: {parts} ({shards} parameter shards)"


def human_bytes(size: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
