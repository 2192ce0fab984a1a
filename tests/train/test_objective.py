"""Next-token objective: the definition of its loss, its router terms, and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.data.rows.batch import Batch
from mixtral_jax.moe.balance import balance_loss, z_loss
from mixtral_jax.train.objective import RouterConfig, next_token, token_sums
from mixtral_jax.train.step import loss_and_gradients, make_eval_step
from tests.tiny import largest_relative_difference, random_batch, regroup, split, tiny_config, tiny_model

OFF = RouterConfig(router_aux_loss_coef=0, router_z_loss_coef=0)


def rows_of(batch):
    return Batch(*(x[0] for x in batch))


def measure(router, batch, config=None):
    config = config or tiny_config()
    params, merge = split(tiny_model(config))
    objective = next_token(router, config)
    function = jax.jit(lambda p, b: loss_and_gradients(objective, merge, p, None, b))
    loss, parts, grads = function(params, batch)
    return float(loss), objective.report(parts), grads


def test_loss_is_the_weighted_mean_of_the_logits_nll():
    config, batch = tiny_config(), random_batch((1, 4, 16))
    rows = rows_of(batch)
    model = tiny_model(config)
    logits_BTV = np.asarray(model(rows.tokens, rows.positions, rows.segment_ids), np.float64)
    log_z_BT = np.log(np.sum(np.exp(logits_BTV), -1))
    nll_BT = log_z_BT - np.take_along_axis(logits_BTV, rows.targets[..., None], -1)[..., 0]
    loss, report, _ = measure(OFF, batch)
    assert loss == pytest.approx(np.sum(rows.weights * nll_BT) / np.sum(rows.weights), rel=1e-5)
    right = np.sum(rows.weights * (logits_BTV.argmax(-1) == rows.targets)) / np.sum(rows.weights)
    assert float(report.scalars["train/accuracy"]) == pytest.approx(right, abs=1e-6)
    assert float(report.scalars["train/tokens"]) == np.sum(rows.segment_ids > 0)


def test_coefficients_of_zero_leave_exactly_the_cross_entropy():
    loss, report, _ = measure(OFF, random_batch((1, 4, 16)))
    assert loss == float(report.scalars["train/ce_loss"])
    assert float(report.scalars["train/aux_loss"]) == float(report.scalars["train/z_loss"]) == 0


@pytest.mark.parametrize("kind", ["per_layer", "hf_pooled"])
def test_router_terms_are_weighted_and_their_raw_values_reported(kind):
    config, batch = tiny_config(), random_batch((1, 4, 16))
    _, stats = token_sums(tiny_model(config), rows_of(batch))
    router = RouterConfig(balance_loss=kind, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    loss, report, _ = measure(router, batch)
    scalars = {k: float(v) for k, v in report.scalars.items()}
    assert scalars["train/aux_loss"] == pytest.approx(0.3 * float(balance_loss(stats, kind, 2)), rel=1e-5)
    assert scalars["train/z_loss"] == pytest.approx(0.2 * float(z_loss(stats)), rel=1e-5)
    assert loss == pytest.approx(sum(scalars[f"train/{k}_loss"] for k in ("ce", "aux", "z")), rel=1e-6)
    assert scalars["moe/balance"] == pytest.approx(float(balance_loss(stats, "per_layer", 2)) / 2, rel=1e-5)
    assert scalars["moe/z"] == pytest.approx(float(z_loss(stats)) / 2, rel=1e-5)
    assert report.counts_LE.shape == (2, 4)
    assert float(report.counts_LE.sum()) == 2 * 2 * np.sum(batch.segment_ids > 0)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_router_gradient_of_repeated_micro_batches_is_that_of_one(micro_batches):
    """NUMERICS C3: micro-batches that are copies of each other average to the loss and gradient of one of them."""
    one = random_batch((1, 2, 16))
    copies = Batch(*(np.concatenate([x] * micro_batches) for x in one))
    router = RouterConfig(router_aux_loss_coef=1.0, router_z_loss_coef=1.0)
    loss, _, grads = measure(router, one)
    loss_copies, report, grads_copies = measure(router, copies)
    assert loss_copies == pytest.approx(loss, rel=1e-6)
    assert largest_relative_difference(grads_copies, grads) < 1e-5
    assert float(report.scalars["train/tokens"]) == micro_batches * np.sum(one.segment_ids > 0)


def test_router_terms_weigh_micro_batches_by_their_tokens():
    """NUMERICS C3, with unequal micro-batches: sum over micro-batches of tokens / all tokens * its own loss."""
    batch = random_batch((2, 2, 16))
    router = RouterConfig(router_aux_loss_coef=1.0, router_z_loss_coef=0.0)
    _, report, _ = measure(router, batch)
    tokens = [np.sum(s > 0) for s in batch.segment_ids]
    assert tokens[0] != tokens[1]
    each = [float(measure(router, Batch(*(x[a : a + 1] for x in batch)))[1].scalars["train/aux_loss"]) for a in (0, 1)]
    assert float(report.scalars["train/aux_loss"]) == pytest.approx(np.average(each, weights=tokens), rel=1e-5)


def test_a_batch_of_padding_gives_a_loss_and_gradient_of_zero():
    empty = Batch(*(np.zeros_like(x) for x in random_batch((2, 2, 16))))
    loss, report, grads = measure(RouterConfig(), empty)
    assert loss == 0
    assert all(not np.any(np.asarray(g)) for g in jax.tree.leaves(grads))
    assert all(np.isfinite(float(v)) for v in report.scalars.values())


def test_a_dense_model_reports_no_experts():
    config = tiny_config(num_local_experts=1, num_experts_per_tok=1)
    loss, report, _ = measure(RouterConfig(), random_batch((1, 2, 16)), config)
    assert report.counts_LE is None
    assert loss == float(report.scalars["train/ce_loss"])
    assert not any(name.startswith("moe/") for name in report.scalars)


def test_evaluation_is_the_cross_entropy_alone():
    config, batch = tiny_config(), random_batch((1, 4, 16))
    params, merge = split(tiny_model(config))
    objective = next_token(RouterConfig(router_aux_loss_coef=5.0), config)
    sums = make_eval_step(objective, merge)(params, None, batch)
    loss, _, _ = measure(OFF, batch)
    assert float(sums.nll / sums.weight) == pytest.approx(loss, rel=1e-6)
    again = make_eval_step(objective, merge)(params, None, regroup(batch, 2))
    assert jnp.allclose(jnp.stack(again), jnp.stack(sums), rtol=1e-5)
