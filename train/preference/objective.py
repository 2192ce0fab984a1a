"""The objective of DPO and its relatives: log-probabilities of both answers, then the loss of losses.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixtral_jax.config import MixtralConfig
from mixtral_jax.model import Mixtral, Noise, target_logps
from mixtral_jax.moe import RouterStats
from mixtral_jax.train.objective import Objective, RouterConfig, report, router_terms
from mixtral_jax.train.preference.config import DpoConfig
from mixtral_jax.train.preference.losses import Pairs, completion_weights, dpo_loss, dpo_metrics


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
        model = merge(params).dropless()  # whatever rows share its batch
        return jax.lax.map(lambda rows: pair_logps(model, rows, ld_alpha)[0].weighted, batch)

    return jax.jit(sequence_logps)


class PairDivisor(NamedTuple):
    """Counted once over the whole global batch of a step, before any forward pass."""

    pairs: Float[Array, ""]
    chosen_tokens: Float[Array, ""]
    tokens: Float[Array, ""]  # tokens that are not padding


class PreferenceParts(NamedTuple):
    """Shares of the step's metrics from one micro-batch; they add up."""

    pair_loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    tokens: Float[Array, ""]
    learned_tokens: Float[Array, ""]
    pairs: Float[Array, ""]
    rewards: dict[str, Float[Array, ""]]  # rewards/* and logps/*, TRL's names
    stats: RouterStats


class PairSums(NamedTuple):
    """Sums over the pairs of a batch, additive over batches."""

    loss: Float[Array, ""]
    pairs: Float[Array, ""]
    accuracies: Float[Array, ""]
    margins: Float[Array, ""]


def preference(config: DpoConfig, router: RouterConfig, model: MixtralConfig, neftune: float = 0.0) -> Objective:
    """A preference loss over the pairs of a whole optimizer step, plus router terms (DPO: 2305.18290, equation 7).

    Reference log-probabilities are numbers in the batch, whatever the reference is.
    """

    def loss(
        model_: Mixtral, rows: Any, divisor: PairDivisor, key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], PreferenceParts]:
        logps, stats = pair_logps(model_, rows, config.ld_alpha, None if key is None else Noise(key, neftune))
        pairs = pairs_of(rows, logps)
        pair_loss = dpo_loss(config, pairs, num_pairs=divisor.pairs, num_chosen_tokens=divisor.chosen_tokens)
        share = jnp.sum(rows.segment_ids > 0) / divisor.tokens
        aux, z = router_terms(router, model, stats, share)
        learned = jnp.sum(rows.completion > 0).astype(jnp.float32)
        metrics = dpo_metrics(config, pairs, num_pairs=divisor.pairs)
        parts = PreferenceParts(pair_loss, aux, z, share * divisor.tokens, learned, jnp.sum(rows.mask), metrics, stats)
        return pair_loss + aux + z, jax.lax.stop_gradient(parts)

    def evaluate(model_: Mixtral, rows: Any) -> PairSums:
        pairs = pairs_of(rows, pair_logps(model_.dropless(), rows, config.ld_alpha)[0])
        count = jnp.sum(rows.mask)
        metrics = dpo_metrics(config, pairs, num_pairs=1.0)
        # The losses of chosen tokens have a divisor of their own: their mean over this batch stands for each pair.
        mean = dpo_loss(config, pairs, num_pairs=jnp.maximum(count, 1.0))
        return PairSums(mean * count, count, metrics["rewards/accuracies"], metrics["rewards/margins"])

    return Objective(pair_divisor, loss, partial(report, model), evaluate)


def pair_divisor(batch: Any) -> PairDivisor:
    """Of a whole step. All are at least 1, so that a batch of padding only gives a loss of 0."""
    chosen = jnp.sum(batch.lengths[..., 0] * (batch.mask > 0))
    tokens = jnp.sum(batch.segment_ids > 0)
    counts = (jnp.sum(batch.mask), chosen, tokens)
    return PairDivisor(*(jnp.maximum(x.astype(jnp.float32), 1.0) for x in counts))


def pairs_of(rows: Any, logps: PairLogps) -> Pairs:
    """The pairs of rows of (b, K), as P = b K pairs in a line."""

    def line(values_bK2: jax.Array) -> tuple[jax.Array, jax.Array]:
        return values_bK2[..., 0].reshape(-1), values_bK2[..., 1].reshape(-1)

    return Pairs(
        *line(logps.weighted), *line(rows.ref_logps), *line(rows.lengths),
        chosen_nll=-line(logps.plain)[0], mask=rows.mask.reshape(-1),
    )  # fmt: skip
