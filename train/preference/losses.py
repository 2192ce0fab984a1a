"""The preference losses themselves, one function of P pairs for each type."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float, Int

from mixtral_jax.train.preference.config import ALPHA_IS_ONE, DpoConfig, FDivergence, LossType, check_options

SORTED = ("aot", "aot_unpaired")  # compare sorted batches: pair i of the result is no pair of the batch
PER_TOKEN = ("ipo", "sigmoid_norm", "simpo", "orpo")  # divide by the completions' lengths


class Pairs(NamedTuple):
    """Numbers of P pairs, (P,) each. Pairs that only fill up a batch have `mask` 0 and count nowhere."""

    policy_chosen: Array
    policy_rejected: Array
    ref_chosen: Array | None = None  # None: reference-free, a reference log-probability of 0
    ref_rejected: Array | None = None
    chosen_lengths: Array | None = None  # completion tokens, EOS included
    rejected_lengths: Array | None = None
    chosen_nll: Array | None = None  # for sft and orpo; None: -policy_chosen (not the same thing under ld_alpha)
    mask: Array | None = None  # 1 for a pair, 0 for filling


class Known(NamedTuple):
    """Pairs with everything filled in, fp32, harmless where the mask is 0."""

    policy_w: Array
    policy_l: Array
    ref_w: Array
    ref_l: Array
    ratio_w: Array
    ratio_l: Array
    n_w: Array
    n_l: Array
    nll_w: Array
    mask: Array


def known_of(pairs: Pairs, config: DpoConfig) -> Known:
    """Defaults put in, filling made harmless.

    Raises:
        ValueError: lengths that a loss type needs are missing, or one reference of two.
    """
    needs = [kind for kind in config.loss_type if kind in PER_TOKEN]
    if needs and (pairs.chosen_lengths is None or pairs.rejected_lengths is None):
        raise ValueError(f"loss_type {needs[0]} needs chosen_lengths and rejected_lengths")
    if (pairs.ref_chosen is None) != (pairs.ref_rejected is None):
        raise ValueError("give both ref_chosen and ref_rejected, or neither (reference-free)")
    shape = jnp.shape(pairs.policy_chosen)
    mask = jnp.ones(shape, jnp.float32) if pairs.mask is None else jnp.asarray(pairs.mask, jnp.float32)

    def fill(value: Array | None, default: float, harmless: float) -> Array:
        if value is None:
            return jnp.full(shape, default, jnp.float32)
        # Selected before any maths: infinity times the mask's 0 would be NaN, in gradients too.
        return jnp.where(mask > 0, jnp.asarray(value, jnp.float32), harmless)

    given = (pairs.policy_chosen, pairs.policy_rejected, pairs.ref_chosen, pairs.ref_rejected)
    policy_w, policy_l, ref_w, ref_l = (fill(logps, 0, -1) for logps in given)
    ratio_w, ratio_l = policy_w - ref_w, policy_l - ref_l
    n_w, n_l = (jnp.maximum(fill(n, 1, 1), 1) for n in (pairs.chosen_lengths, pairs.rejected_lengths))
    nll_w = -policy_w if pairs.chosen_nll is None else fill(pairs.chosen_nll, 0, 0)
    return Known(policy_w, policy_l, ref_w, ref_l, ratio_w, ratio_l, n_w, n_l, nll_w, mask)


# ---- one function for each loss type: (known, config) -> (P,)


def _score(ratio: Array, c: DpoConfig) -> Array:
    """s = f(Δ), f-DPO (2309.16240) with TRL's constants."""
    kind = c.f_divergence.removesuffix("_divergence")
    if kind == "forward_kl":
        return 1 - jnp.exp(-ratio)
    if kind == "js":
        return jnp.log(2.0) + log_sigmoid(ratio)
    if kind == "alpha" and abs(c.f_alpha - 1) >= ALPHA_IS_ONE:
        # the bound keeps exp finite, as in TRL
        return jnp.expm1(jnp.minimum((c.f_alpha - 1) * ratio, 80.0)) / (c.f_alpha - 1)
    return ratio


def _delta(k: Known, c: DpoConfig) -> Array:
    return _score(k.ratio_w, c) - _score(k.ratio_l, c)


def _delta_per_token(k: Known, c: DpoConfig) -> Array:
    return _score(k.ratio_w, c) / k.n_w - _score(k.ratio_l, c) / k.n_l


def _smoothed(logit: Array, epsilon: float) -> Array:
    """-(1-ε) log σ(x) - ε log σ(-x)."""
    return -(1 - epsilon) * log_sigmoid(logit) - epsilon * log_sigmoid(-logit)


def _sigmoid(k: Known, c: DpoConfig) -> Array:
    """-log σ(βδ), DPO (2305.18290, equation 7); with ε: conservative DPO, -(1-ε) log σ(βδ) - ε log σ(-βδ)."""
    return _smoothed(c.beta * _delta(k, c), c.label_smoothing)


def _robust(k: Known, c: DpoConfig) -> Array:
    """(-(1-ε) log σ(βδ) + ε log σ(-βδ)) / (1 - 2ε), unbiased under flipped labels (2403.00409)."""
    logit, epsilon = c.beta * _delta(k, c), c.label_smoothing
    return (-(1 - epsilon) * log_sigmoid(logit) + epsilon * log_sigmoid(-logit)) / (1 - 2 * epsilon)


def _hinge(k: Known, c: DpoConfig) -> Array:
    """max(0, 1 - βδ), SLiC (2305.10425)."""
    return jax.nn.relu(1 - c.beta * _delta(k, c))


def _ipo(k: Known, c: DpoConfig) -> Array:
    """(s_w/n_w - s_l/n_l - 1/(2β))², IPO (2310.12036) per token."""
    return (_delta_per_token(k, c) - 1 / (2 * c.beta)) ** 2


def _exo_pair(k: Known, c: DpoConfig) -> Array:
    """KL(q ‖ p) with q = (σ(βδ), σ(-βδ)) and p = (1-ε, ε), EXO (2402.00856)."""
    logit, epsilon = c.beta * _delta(k, c), c.label_smoothing
    won = sigmoid(logit) * (log_sigmoid(logit) - jnp.log1p(-epsilon))
    return won + sigmoid(-logit) * (log_sigmoid(-logit) - jnp.log(epsilon))


def _nca_pair(k: Known, c: DpoConfig) -> Array:
    """-log σ(βΔ_w) - ½ log σ(-βΔ_w) - ½ log σ(-βΔ_l), NCA (2402.05369)."""
    won, lost = c.beta * k.ratio_w, c.beta * k.ratio_l
    return -log_sigmoid(won) - 0.5 * log_sigmoid(-won) - 0.5 * log_sigmoid(-lost)


def _bco_pair(k: Known, c: DpoConfig) -> Array:
    """-log σ(βΔ_w) - log σ(-βΔ_l), BCO without its shift (2404.04656)."""
    return -log_sigmoid(c.beta * k.ratio_w) - log_sigmoid(-c.beta * k.ratio_l)


def _sppo_hard(k: Known, c: DpoConfig) -> Array:
    """(Δ_w - 1/(2β))² + (Δ_l + 1/(2β))², SPPO with win probabilities 1 and 0 (2405.00675)."""
    return (k.ratio_w - 0.5 / c.beta) ** 2 + (k.ratio_l + 0.5 / c.beta) ** 2


def _sorted(values: Array, mask: Array) -> Array:
    """Ascending, filling last."""
    return values[jnp.argsort(jnp.where(mask > 0, values, jnp.inf))]


def _aot(k: Known, c: DpoConfig) -> Array:
    """Smoothed -log σ(β(a - b)), a and b sorted: logπ_w - logπ_l of policy and of reference, AOT (2406.05882)."""
    policy, reference = _sorted(k.policy_w - k.policy_l, k.mask), _sorted(k.ref_w - k.ref_l, k.mask)
    return _smoothed(c.beta * (policy - reference), c.label_smoothing)


def _aot_unpaired(k: Known, c: DpoConfig) -> Array:
    """As aot with a = Δ_w and b = Δ_l."""
    return _smoothed(c.beta * (_sorted(k.ratio_w, k.mask) - _sorted(k.ratio_l, k.mask)), c.label_smoothing)


def _apo_zero(k: Known, c: DpoConfig) -> Array:
    """1 - σ(βΔ_w) + σ(βΔ_l), APO (2408.06266): chosen answers better than the model's own."""
    return sigmoid(-c.beta * k.ratio_w) + sigmoid(c.beta * k.ratio_l)


def _apo_down(k: Known, c: DpoConfig) -> Array:
    """σ(βΔ_w) + 1 - σ(β(Δ_w - Δ_l)), APO (2408.06266): chosen answers worse than the model's own."""
    return sigmoid(c.beta * k.ratio_w) + sigmoid(-c.beta * (k.ratio_w - k.ratio_l))


def _discopop(k: Known, c: DpoConfig) -> Array:
    """-(1-m) log σ(x) + m e^(-x), x = βδ, m = σ(x/τ), DiscoPOP (2406.08414)."""
    logit = c.beta * _delta(k, c)
    modulation = logit / c.discopop_tau
    # m·e^(-x) in one exponential: apart, they are 0 times infinity at x < -88
    return -sigmoid(-modulation) * log_sigmoid(logit) + jnp.exp(log_sigmoid(modulation) - logit)


def _sigmoid_norm(k: Known, c: DpoConfig) -> Array:
    """-log σ(β(s_w/n_w - s_l/n_l))."""
    return -log_sigmoid(c.beta * _delta_per_token(k, c))


def _simpo(k: Known, c: DpoConfig) -> Array:
    """-log σ(β(logπ_w/n_w - logπ_l/n_l) - γ), SimPO (2405.14734); label smoothing as for sigmoid."""
    return _smoothed(c.beta * (k.policy_w / k.n_w - k.policy_l / k.n_l) - c.gamma, c.label_smoothing)


def log_odds(k: Known) -> Array:
    """log odds(y_w) - log odds(y_l) with odds(y) = p/(1-p), p = exp(logπ/n)."""
    chosen, rejected = k.policy_w / k.n_w, k.policy_l / k.n_l
    return (chosen - rejected) - (jax.nn.log1mexp(-chosen) - jax.nn.log1mexp(-rejected))


def _orpo(k: Known, c: DpoConfig) -> Array:
    """-β log σ(log odds ratio), ORPO (2403.07691), β its λ; `dpo_loss` adds the token mean of chosen_nll."""
    return -c.beta * log_sigmoid(log_odds(k))


# Each is called what a user calls it, behind the underscore.
PAIR_LOSSES: dict[str, Callable[[Known, DpoConfig], Array]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _sigmoid, _robust, _hinge, _ipo, _exo_pair, _nca_pair, _bco_pair, _sppo_hard, _aot, _aot_unpaired,
        _apo_zero, _apo_down, _discopop, _sigmoid_norm, _simpo, _orpo,
    )
}  # fmt: skip


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
        beta=beta, label_smoothing=label_smoothing, f_divergence=f_divergence, f_alpha=f_alpha, gamma=gamma,
        discopop_tau=discopop_tau,
    )  # fmt: skip
    check_options(config)
    pairs = Pairs(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, chosen_nll,
        pair_mask,
    )  # fmt: skip
    return dpo_loss(config, pairs, num_pairs=num_pairs, num_chosen_tokens=num_chosen_tokens)


def dpo_loss(
    config: DpoConfig, pairs: Pairs, *, num_pairs: Array | float | None = None,
    num_chosen_tokens: Array | float | None = None,
) -> Float[Array, ""]:  # fmt: skip
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
