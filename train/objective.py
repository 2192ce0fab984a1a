"""What is minimised: an objective is two functions, weight(batch) and loss(model, frozen, batch, divisor)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from mixtral_jax.config import FrozenConfig, MixtralConfig
from mixtral_jax.model import Mixtral, Noise, next_token_sums
from mixtral_jax.moe import RouterStats, balance_loss, load_metrics, z_loss


class RouterConfig(FrozenConfig):
    """The router's own losses; a coefficient of 0 switches one off."""

    balance_loss: Literal["per_layer", "hf_pooled"] = Field(
        "per_layer",
        description="per_layer: Switch's definition summed over layers; hf_pooled: that of transformers",
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="coefficient of the balance loss")
    router_z_loss_coef: float = Field(0.001, ge=0, description="coefficient of the router z-loss")


class Divisor(NamedTuple):
    """Counted once over the whole global batch of a step, before any forward pass."""

    weight: Float[Array, ""]  # sum of the target weights
    tokens: Float[Array, ""]  # tokens that are not padding


class Report(NamedTuple):
    """An objective's part of the metrics of a step."""

    scalars: dict[str, Float[Array, ""]]
    counts_LE: Float[Array, "L E"] | None


class EvalSums(NamedTuple):
    """Additive over batches."""

    nll: Float[Array, ""]  # sum of w * nll, nats
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    entropy: Any = 0.0  # sum of w * entropy of the prediction, nats, where it was asked for


class Objective(NamedTuple):
    """What the step knows of an objective. `parts` are sums over micro-batches of whatever `report` needs.

    weight(batch of (A, b, ...)) -> divisor · loss(model, rows of (b, ...), divisor, key of the noise or None) -> (this
    micro-batch's share of the loss, parts) · report(parts) -> metrics · evaluate(model, rows) -> sums without router
    terms and noise, additive over batches.
    """

    weight: Callable[[Any], Any]
    loss: Callable[[Any, Any, Any, jax.Array | None], tuple[Float[Array, ""], Any]]
    report: Callable[[Any], Report]
    evaluate: Callable[[Any, Any], Any]


class NextTokenParts(NamedTuple):
    """Shares of the step's metrics from one micro-batch; they add up."""

    ce_loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    entropy: Float[Array, ""] | None  # of the prediction, nats, mean over the targets by weight; where asked for
    tokens: Float[Array, ""]  # not padding
    learned_tokens: Float[Array, ""]  # targets with a weight
    stats: RouterStats


def next_token(
    router: RouterConfig,
    model: MixtralConfig,
    neftune: float = 0.0,
    *,
    entropy: bool = False,
    skip_masked: bool = False,
) -> Objective:
    """Next-token prediction for pretraining and SFT; the data sets the weights (NUMERICS D1).

    loss = sum w * nll / W + router terms. The router terms are products of batch means, so they are not additive: those
    of a micro-batch are weighted by its share of the step's tokens (NUMERICS C3). `entropy`: report that too.
    `skip_masked`: spend no logits on tokens without a weight, which pays where they are many.
    """

    def loss(
        model_: Mixtral, rows: Any, divisor: Divisor, key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], NextTokenParts]:
        noise = None if key is None else Noise(key, neftune)
        sums, stats = token_sums(model_, rows, noise, entropy=entropy, skip_masked=skip_masked)
        share = jnp.sum(rows.segment_ids > 0) / divisor.tokens
        aux, z = router_terms(router, model, stats, share)
        ce, accuracy = sums.nll / divisor.weight, sums.correct / divisor.weight
        learned = jnp.sum(rows.weights > 0).astype(jnp.float32)
        spread = sums.entropy / divisor.weight if entropy else None
        parts = NextTokenParts(ce, aux, z, accuracy, spread, share * divisor.tokens, learned, stats)
        return ce + aux + z, jax.lax.stop_gradient(parts)

    def evaluate(model_: Mixtral, rows: Any) -> EvalSums:
        return token_sums(model_.dropless(), rows, skip_masked=skip_masked)[0]

    return Objective(batch_divisor, loss, partial(report, model), evaluate)


def router_terms(
    router: RouterConfig, model: MixtralConfig, stats: RouterStats, share: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Balance loss and z-loss of a micro-batch, times their coefficients and its share of the step's tokens."""
    aux, z = jnp.zeros(()), jnp.zeros(())
    if router.router_aux_loss_coef and not model.is_dense:
        balance = balance_loss(stats, router.balance_loss, model.num_experts_per_tok)
        aux = router.router_aux_loss_coef * share * balance
    if router.router_z_loss_coef and not model.is_dense:
        z = router.router_z_loss_coef * share * z_loss(stats)
    return aux, z


def report(model: MixtralConfig, parts: Any) -> Report:
    """Parts as metrics: train/* or their own names and, of a sparse model, moe/* and the counts of its experts."""
    values = parts._asdict()
    stats, rewards = values.pop("stats"), values.pop("rewards", {})
    scalars = {f"train/{name}": value for name, value in values.items() if value is not None} | rewards
    if model.is_dense:
        return Report(scalars, None)
    health = load_metrics(stats, model.num_experts_per_tok)
    health["moe/z"] = z_loss(stats) / model.num_hidden_layers
    return Report(scalars | health, stats.counts_LE)


def batch_divisor(batch: Any) -> Divisor:
    """Of a whole step. Both are at least 1, so that a batch of padding only gives a loss of 0."""
    weight = jnp.sum(batch.weights, dtype=jnp.float32)
    tokens = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
    return Divisor(jnp.where(weight > 0, weight, 1.0), jnp.maximum(tokens, 1.0))


def token_sums(
    model: Mixtral, rows: Any, noise: Noise | None = None, *, entropy: bool = False, skip_masked: bool = False
) -> tuple[EvalSums, RouterStats]:
    """Summed cross-entropy of rows of (b, T), and the router's statistics."""
    sums, stats = next_token_sums(
        model, rows.tokens, rows.targets, rows.weights, rows.positions, rows.segment_ids, noise,
        entropy=entropy, skip_masked=skip_masked,
    )  # fmt: skip
    weight = jnp.sum(rows.weights, dtype=jnp.float32)
    return EvalSums(sums.loss_sum, weight, sums.correct_sum, sums.entropy_sum), stats
