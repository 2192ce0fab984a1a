"""Where a run's memory lies: what each axis of the mesh shares, and what it leaves whole on every device."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from mixtral_jax.model import compute_dtype
from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.plan.dry_run import human_bytes

# What each axis of the mesh shares out.
SHARES = {
    "data": "rows of the batch; parameters are whole on each of its devices",
    "fsdp": "rows of the batch, and all matrices with their gradients and moments",
    "expert": "rows of the batch, the experts, and all other matrices together with fsdp",
    "tensor": "heads, ffn and vocabulary",
    "context": "the tokens of each row",
}
LARGE_BYTES, LARGE_SHARE = 64 * 2**20, 0.01


def axis_lines(sizes: Mapping[str, int]) -> list[str]:
    """What each axis of more than one device shards."""
    return [f"{axis} {size}: {SHARES[axis]}" for axis, size in sizes.items() if size > 1]


def replicated(leaves: Iterable[tuple[str, Any]]) -> list[tuple[str, int]]:
    """(path, bytes) of the large leaves that every device of the mesh holds whole, the largest first.

    Large is above 64 MiB or a hundredth of all; `leaves` have shape, dtype and sharding.
    """
    found = [(path, leaf, leaf.size * leaf.dtype.itemsize) for path, leaf in leaves]
    total = sum(size for _, _, size in found)
    whole = [
        (path, size)
        for path, leaf, size in found
        if len(leaf.sharding.device_set) > 1
        and leaf.sharding.is_fully_replicated
        and (size > LARGE_BYTES or size > LARGE_SHARE * total)
    ]
    return sorted(whole, key=lambda pair: -pair[1])


def passing_line(config: RunConfig, sizes: dict[str, int]) -> str:
    """What comes and goes in a step on one device, by the closed form of `plan`, which knows no compiler's tricks."""
    from mixtral_jax.train.plan.closed_form import (  # the planner compiles a run, whose first screen this is
        Shape,
        memory,
    )

    dtype = compute_dtype(config.compute.dtype).name
    resolved = config.model_copy(update={"compute": config.compute.model_copy(update={"dtype": dtype})})
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]
    tokens = config.rows_per_micro_batch * config.seq_len // shards
    parts = memory(resolved, Shape(sizes, tokens, config.accumulation))
    saved, layer, weights = (parts[name] for name in ("saved", "layer", "weights"))
    return (
        f"about {human_bytes(saved + layer)} of activations a device ({human_bytes(saved)} saved for the backward "
        f"pass) and {human_bytes(weights)} of gathered weights"
    )


def placement_warnings(
    config: RunConfig, mesh: jax.sharding.Mesh | None, leaves: Iterable[tuple[str, Any]]
) -> list[str]:
    """What a person may not have meant: leaves whole everywhere, a padded vocabulary, adapters on a random base."""
    warnings = []
    large = replicated(leaves)
    if large:
        named = ", ".join(f"{path} ({human_bytes(size)})" for path, size in large[:3])
        more = f" and {len(large) - 3} more" if len(large) > 3 else ""
        total = human_bytes(sum(size for _, size in large))
        warnings.append(
            f"each of the {math.prod(mesh.shape.values()) if mesh else 1} devices holds all of {named}{more}: {total} "
            "of parameters, and their gradients and moments beside them; mesh.fsdp would share them"
        )
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    vocabulary = config.model.vocab_size
    if vocabulary % tensor:
        warnings.append(
            f"mesh.tensor ({tensor}) does not divide model.vocab_size ({vocabulary}): embedding and head are stored "
            f"whole along tensor, and padded to {-(-vocabulary // tensor) * tensor} rows where they are used"
        )
    if config.adapters is not None and config.init_from is None:
        warnings.append(
            "lora trains adapters on a base of random numbers, for init_from names no weights: "
            "set init_from to a checkpoint"
        )
    return warnings
