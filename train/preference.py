"""The DPO family: losses of a pair of answers as pure functions of their log-probabilities.

Letters: P pairs; w the chosen (winning) answer, l the rejected one. Of each answer, logπ is the sum over its completion
tokens (EOS included), Δ = logπ - logπ_ref, s = f(Δ) by the f-divergence (s = Δ for reverse KL), δ = s_w - s_l,
n = completion tokens. Every loss is a sum over pairs divided by `num_pairs`, so that the parts of an optimizer step,
each given the divisor of the whole step, add up to the mean over all its pairs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float, Int

from train.preference_config import DpoConfig, FDivergence, LossType, check_options
from train.preference_losses import PAIR_LOSSES, SORTED, Pairs, known_of, log_odds

__all__ = ["DpoConfig", "Pairs", "completion_weights", "dpo_loss", "dpo_metrics", "loss"]


def loss(
    loss_type: LossType | Sequence[LossType],
    *,
    policy_chosen: Float[Array, "P"],
    policy_rejected: Float[Array, "P"],
    ref_chosen: Float[Array, "P"] | None = None,
    ref_rejected: Float[Array, "P"] | None = None,
    chosen_lengths: Int[Array, "P"] | None = None,
    rejected_lengths: Int[Array, "P"] | None = None,
    chosen_nll: Float[Array, "P"] | None = None,
    pair_mask: Array | None = None,
    num_pairs: Array | float | None = None,
    num_chosen_tokens: Array | float | None = None,
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: float = 0.5,
    gamma: float = 0.5,
    discopop_tau: float = 0.05,
) -> Float[Array, ""]:
    """The preference loss of some pairs, one type or a weighted sum of several.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: log-probabilities summed over the completion;
            without references (None) they count as 0.
        chosen_lengths, rejected_lengths: completion tokens; needed by ipo, sigmoid_norm, simpo, orpo (and sft).
        chosen_nll: summed negative log-likelihood for sft and orpo; None is -policy_chosen.
        num_pairs, num_chosen_tokens: divisors of the whole optimizer step; None takes those of these pairs.
        loss_weights: one for each type; None is 1 for each.

    Raises:
        ValueError: an unknown type, options that do not fit the types, or missing lengths.
    """
    config = DpoConfig.model_construct(
        loss_type=(loss_type,) if isinstance(loss_type, str) else tuple(loss_type),
        loss_weights=None if loss_weights is None else tuple(loss_weights),
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        gamma=gamma,
        discopop_tau=discopop_tau,
    )
    check_options(config)
    pairs = Pairs(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        chosen_lengths,
        rejected_lengths,
        chosen_nll,
        pair_mask,
    )
    return dpo_loss(config, pairs, num_pairs=num_pairs, num_chosen_tokens=num_chosen_tokens)


def dpo_loss(
    config: DpoConfig,
    pairs: Pairs,
    *,
    num_pairs: Array | float | None = None,
    num_chosen_tokens: Array | float | None = None,
) -> Float[Array, ""]:
    """`loss` with its options in a validated configuration."""
    known = known_of(pairs, config)
    num_pairs = known.mask.sum() if num_pairs is None else num_pairs
    weights = config.loss_weights or (1.0,) * len(config.loss_type)
    total = jnp.zeros((), jnp.float32)
    for kind, weight in zip(config.loss_type, weights, strict=True):
        part = jnp.zeros((), jnp.float32)
        if kind != "sft":
            # A sorted loss has its real pairs first.
            mask = jnp.sort(known.mask, descending=True) if kind in SORTED else known.mask
            part += jnp.sum(mask * PAIR_LOSSES[kind](known, config)) / num_pairs
        if kind in ("sft", "orpo"):
            if pairs.chosen_lengths is None and num_chosen_tokens is None:
                raise ValueError(f"loss_type {kind} needs chosen_lengths or num_chosen_tokens")
            tokens = jnp.sum(known.mask * known.n_w) if num_chosen_tokens is None else num_chosen_tokens
            part += jnp.sum(known.mask * known.nll_w) / tokens
        total += weight * part
    return total


def dpo_metrics(config: DpoConfig, pairs: Pairs, *, num_pairs: Array | float | None = None) -> dict[str, Array]:
    """TRL's metrics, each a sum over pairs / num_pairs: the parts of an optimizer step add up.

    rewards/* are βΔ, whatever the f-divergence; where every pair loss is simpo or orpo, they and logps/* are of
    log-probabilities per token, as in TRL's CPO and ORPO trainers. An accuracy counts strictly larger rewards.
    """
    known = jax.tree.map(jax.lax.stop_gradient, known_of(pairs, config))
    num_pairs = known.mask.sum() if num_pairs is None else num_pairs
    chosen, rejected = known.policy_w, known.policy_l
    reward_w, reward_l = config.beta * known.ratio_w, config.beta * known.ratio_l
    if config.averaged:
        chosen, rejected = chosen / known.n_w, rejected / known.n_l
        reward_w, reward_l = config.beta * chosen, config.beta * rejected
    per_pair = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": (reward_w > reward_l).astype(jnp.float32),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    if "orpo" in config.loss_type:
        odds = log_odds(known)
        per_pair |= {"log_odds_chosen": odds, "log_odds_ratio": log_sigmoid(odds)}
    return {name: jnp.sum(known.mask * value) / num_pairs for name, value in per_pair.items()}


def completion_weights(
    index: Int[Array, "..."], shared_length: Int[Array, "..."], ld_alpha: float | None
) -> Float[Array, "..."]:
    """Weight of each token in logπ: 0 outside the completion, 1 up to the length both answers share, then ld_alpha.

    LD-DPO (2409.06411). `index` counts the completion's tokens from 1 and is 0 elsewhere; `shared_length` is
    min(n_w, n_l) of the token's own pair. The reference's sums take the same weights. None is an ld_alpha of 1.
    """
    tail = 1.0 if ld_alpha is None else ld_alpha
    return jnp.where(index == 0, 0.0, jnp.where(index <= shared_length, 1.0, tail))
