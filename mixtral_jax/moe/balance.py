"""Router losses and load statistics, all from sums over the tokens of the global micro-batch, in fp32.

Two balance losses are in use and are not interchangeable; both are here, by name.
"""

import itertools
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mixtral_jax.moe.router import Routing
from mixtral_jax.parallel import TOKEN_AXES, psum

BalanceLoss = Literal["per_layer", "hf_pooled"]


class RouterStats(NamedTuple):
    """Sums over the valid (non-padding) tokens; inside one layer the leading L is absent."""

    counts_LE: Float[Array, "*L E"]  # choices that fell on each expert, before any dropping; no gradient
    probs_LE: Float[Array, "*L E"]  # sum of router probabilities
    z_L: Float[Array, "*L"]  # sum of logsumexp(logits)^2
    entropy_L: Float[Array, "*L"]  # sum of the entropy of the router probabilities, nats
    dropped_L: Float[Array, "*L"]  # choices dropped by the capacity limit
    dropped_first_L: Float[Array, "*L"]  # of them first choices
    overflow_L: Float[Array, "*L"]  # choices of exchanges that took more than one round (MoeConfig.buffer_factor)
    tokens_L: Float[Array, "*L"]  # number of valid tokens, the same in every layer


def router_stats(
    routing: Routing, valid_M: Float[Array, " M"], dropped_MC: Bool[Array, "M C"] | None = None
) -> RouterStats:
    """Statistics of one layer over this device's tokens."""
    experts = routing.probs_ME.shape[-1]
    chosen_ME = jnp.sum(jax.nn.one_hot(routing.expert_MC, experts, dtype=jnp.float32), axis=1)
    log_z_M = jax.nn.logsumexp(routing.logits_ME, axis=-1)
    entropy_M = log_z_M - jnp.sum(routing.probs_ME * routing.logits_ME, axis=-1)
    over_tokens = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # accelerators would round what they take
    dropped_C = jnp.zeros((2,)) if dropped_MC is None else jnp.sum(dropped_MC, axis=0, dtype=jnp.float32)
    return RouterStats(
        counts_LE=jax.lax.stop_gradient(over_tokens(valid_M, chosen_ME)),
        probs_LE=over_tokens(valid_M, routing.probs_ME),
        z_L=jnp.sum(valid_M * jnp.square(log_z_M)),
        entropy_L=jax.lax.stop_gradient(jnp.sum(valid_M * entropy_M)),
        dropped_L=jnp.sum(dropped_C),
        dropped_first_L=dropped_C[0],
        overflow_L=jnp.zeros(()),
        tokens_L=jnp.sum(valid_M),
    )


def over_devices(stats: RouterStats) -> RouterStats:
    """Of all layers, summed over the devices that share the tokens: one all-reduce of (L, 2 E + 6) numbers."""
    columns = [field.reshape(field.shape[0], -1) for field in stats]
    ends = list(itertools.accumulate(column.shape[1] for column in columns))
    sums = jnp.split(psum(jnp.concatenate(columns, axis=1), TOKEN_AXES), ends[:-1], axis=1)
    return RouterStats(*(column.reshape(field.shape) for column, field in zip(sums, stats, strict=True)))


def balance_loss(stats: RouterStats, kind: BalanceLoss, top_k: int) -> Float[Array, ""]:
    """The load-balancing loss, before its coefficient.

    per_layer: sum over layers of E/k * sum_e f_e P_e, f and P means over the layer's tokens; 1 per layer when balanced
    (Switch 2101.03961, eq. 4, for top-k). hf_pooled: E * sum_e f_e P_e with f and P means over the tokens of all layers
    pooled; k when balanced; what transformers computes. Pooling hides a collapse onto different experts per layer.
    """
    experts = stats.counts_LE.shape[-1]
    tokens = jnp.maximum(stats.tokens_L, 1.0)
    f_LE, p_LE = stats.counts_LE / tokens[:, None], stats.probs_LE / tokens[:, None]
    if kind == "per_layer":
        return experts / top_k * jnp.sum(f_LE * p_LE)
    return experts * jnp.sum(jnp.mean(f_LE, axis=0) * jnp.mean(p_LE, axis=0))


def z_loss(stats: RouterStats) -> Float[Array, ""]:
    """Sum over layers of mean over tokens of logsumexp(logits)^2, before its coefficient (ST-MoE 2202.08906, eq. 5)."""
    return jnp.sum(stats.z_L / jnp.maximum(stats.tokens_L, 1.0))


def load_metrics(stats: RouterStats, top_k: int) -> dict[str, Float[Array, ""]]:
    """Expert health: loads relative to uniform (1 is even), averaged over layers where a layer has one number."""
    layers, experts = stats.counts_LE.shape
    choices_L = jnp.maximum(stats.tokens_L, 1.0) * top_k
    load_LE = stats.counts_LE * experts / choices_L[:, None]
    return {
        "moe/balance": balance_loss(stats, "per_layer", top_k) / layers,
        "moe/load_max": jnp.max(load_LE),
        "moe/load_min": jnp.min(load_LE),
        "moe/dead_fraction": jnp.mean((stats.counts_LE == 0).astype(jnp.float32)),
        "moe/entropy": jnp.mean(stats.entropy_L / jnp.maximum(stats.tokens_L, 1.0)),
        "moe/dropped_fraction": jnp.mean(stats.dropped_L / choices_L),
        "moe/overflow_fraction": jnp.mean(stats.overflow_L / jnp.maximum(choices_L - stats.dropped_L, 1.0)),
        "moe/dropped_first": jnp.mean(stats.dropped_first_L * top_k / choices_L),
    }
