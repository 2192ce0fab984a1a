"""Log-probabilities of whole completions: the numbers that preference learning is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixtral_jax.model import Mixtral, Noise, target_logps
from mixtral_jax.moe.balance import RouterStats
from mixtral_jax.train.preference.losses import completion_weights


class PairLogps(NamedTuple):
    """Of the pairs of some rows; the last axis is (chosen, rejected)."""

    weighted: Float[Array, "b K 2"]  # sums over the completion, its tail weighted by ld_alpha
    plain: Float[Array, "b K 2"]  # sums over the completion


def pair_logps(
    model: Mixtral, rows: Any, ld_alpha: float | None, noise: Noise | None = None
) -> tuple[PairLogps, RouterStats]:
    """log p of both completions of each pair in rows of (b, T), EOS included, from one forward pass (NUMERICS D4)."""
    inside_bT = rows.completion > 0
    logps_bT, stats = target_logps(model, rows.tokens, rows.targets, inside_bT, rows.positions, rows.segment_ids, noise)
    pairs = rows.mask.shape[-1]
    pair_bT = jnp.clip((rows.segment_ids - 1) // 2, 0, pairs - 1)
    shared_bT = jnp.take_along_axis(jnp.min(rows.lengths, axis=-1), pair_bT, axis=1)
    weights_bT = completion_weights(rows.completion, shared_bT, ld_alpha)

    def by_segment(values_bT: jax.Array) -> jax.Array:
        sums = [jnp.sum(jnp.where(rows.segment_ids == s + 1, values_bT, 0.0), axis=1) for s in range(2 * pairs)]
        return jnp.stack(sums, axis=-1).reshape(-1, pairs, 2)

    return PairLogps(by_segment(logps_bT * weights_bT), by_segment(logps_bT)), stats


def make_sequence_logps(
    merge: Callable[[Any], Mixtral], ld_alpha: float | None
) -> Callable[[Any, Any], Float[Array, "A b K 2"]]:
    """sequence_logps(params, batch): what a reference says of a batch of (A, b, ...), jitted.

    Every kind of reference is this function; they differ in whose parameters it gets, and when (DESIGN decision 6).
    """

    def sequence_logps(params: Any, batch: Any) -> jax.Array:
        model = merge(params)
        return jax.lax.map(lambda rows: pair_logps(model, rows, ld_alpha)[0].weighted, batch)

    return jax.jit(sequence_logps)
