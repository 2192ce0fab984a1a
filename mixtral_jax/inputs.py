"""What callers give a model, as arrays: rows of ids, and choices of experts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mixtral_jax.config import MixtralConfig
from mixtral_jax.moe import Routing

Tokens_BT = Int[Array, "B T"] | np.ndarray | Sequence[Sequence[int]]
Choices = Routing | Int[Array, "B T L C"] | np.ndarray  # of experts, by layer
NO_ROUTER = "routing: a dense model has no router"


def as_ids(rows: Tokens_BT | None, name: str, limit: int) -> Int[Array, "B T"] | None:
    """Rows of integers as an array. What is on a device already is taken as it is, since looking would wait for it.

    Raises:
        ValueError: rows of different lengths, what are no rows of integers, or numbers that are not below `limit`.
    """
    if rows is None:
        return None
    if not isinstance(rows, jax.Array | np.ndarray):
        lengths = sorted({np.size(row) for row in rows})
        if len(lengths) > 1:
            few, most = lengths[0], lengths[-1]
            raise ValueError(f"{name}: rows of {few} to {most}: pad them to one length, segment_ids 0 in the padding")
        rows = np.asarray(rows)
    if rows.ndim != 2 or not (jnp.issubdtype(rows.dtype, jnp.integer) or rows.dtype == bool):
        raise ValueError(f"{name} are rows of integers (B, T), as in [[1, 2, 3]], not {rows.dtype} {rows.shape}")
    if isinstance(rows, jax.Array):
        return rows
    if rows.size and not 0 <= rows.min() <= rows.max() < limit:
        raise ValueError(f"{name} are from 0 to {limit - 1}, not {rows.min()} to {rows.max()}")
    return jnp.asarray(rows, jnp.int32)


def fill_rows(tokens_BT: jax.Array, positions: jax.Array | None, segments: jax.Array | None) -> tuple[jax.Array, ...]:
    """(tokens, positions, segments) with the defaults: one document, counted from 0."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    return tokens_BT, positions, jnp.ones_like(tokens_BT) if segments is None else segments


def chosen_experts(routing: Choices | None, config: MixtralConfig, tokens_BT: jax.Array) -> tuple[jax.Array, ...]:
    """The experts (B, T, L, k) as a row of one argument, or of none where the routers decide."""
    if routing is None:
        return ()
    if config.is_dense:
        raise ValueError(NO_ROUTER)
    chosen: Any = routing.expert_MC if isinstance(routing, Routing) else routing
    chosen = chosen if isinstance(chosen, jax.Array) else np.asarray(chosen)
    wanted = (*tokens_BT.shape, config.num_hidden_layers, config.num_experts_per_tok)
    if np.shape(chosen) != wanted or not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"routing: indices of experts (B, T, L, k) = {wanted}, not {chosen.dtype} {np.shape(chosen)}")
    if isinstance(chosen, np.ndarray) and not (chosen >= 0).all() & (chosen < config.num_local_experts).all():
        raise ValueError(
            f"routing: experts are from 0 to {config.num_local_experts - 1}, not {chosen.min()} to {chosen.max()}"
        )
    return (jnp.asarray(chosen, jnp.int32),)
