"""The step: accumulation is exact, the state is donated, one compiled function serves a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.train.objective import RouterConfig, next_token
from mixtral_jax.train.optimizer import OptimizerConfig, make_optimizer
from mixtral_jax.train.state import create_state
from mixtral_jax.train.step import loss_and_gradients, make_train_step
from tests.tiny import largest_relative_difference, random_batch, regroup, split, tiny_config, tiny_model

OFF = RouterConfig(router_aux_loss_coef=0, router_z_loss_coef=0)


def make(router=OFF, **optimizer):
    config = tiny_config()
    params, merge = split(tiny_model(config))
    chosen = make_optimizer(OptimizerConfig(**{"learning_rate": 0.01, **optimizer}), 20)
    return create_state(params, chosen), next_token(router, config), merge, chosen


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulation_with_unequal_masks_is_one_full_batch(micro_batches):
    """NUMERICS D1: mean of means would be far off here, since the weights of the micro-batches differ."""
    state, objective, merge, _ = make()
    full = random_batch((1, 8, 16))
    function = jax.jit(lambda batch: loss_and_gradients(objective, merge, state.params, None, batch))
    loss, _, grads = function(full)
    parts = regroup(full, micro_batches)
    loss_parts, _, grads_parts = function(parts)
    assert float(loss_parts) == pytest.approx(float(loss), rel=1e-6)
    assert largest_relative_difference(grads_parts, grads) < 1e-5
    each = [float(function(jax.tree.map(lambda x, a=a: x[a : a + 1], parts))[0]) for a in range(micro_batches)]
    assert abs(np.mean(each) - float(loss)) > 1e-4


def test_one_step_updates_once_and_reports():
    state, objective, merge, optimizer = make(RouterConfig())
    before = jax.tree.map(np.array, state.params)
    step = make_train_step(objective, optimizer, merge)
    batch = random_batch((2, 4, 16))
    after, report = step(state, None, batch)
    assert int(after.step) == 1 and bool(report.healthy)
    assert state.params["embed"]["weight"].is_deleted()  # donated
    assert largest_relative_difference(after.params, before) > 1e-4
    assert set(report.scalars) >= {
        f"train/{n}"
        for n in ("loss", "ce_loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens", "accuracy")
    }
    assert set(report.scalars) >= {
        f"moe/{n}"
        for n in ("balance", "load_max", "load_min", "dead_fraction", "entropy", "dropped_fraction", "dropped_first")
    }
    assert float(report.scalars["moe/overflow_fraction"]) == 0
    assert float(report.counts_LE.sum()) == 2 * 2 * np.sum(batch.segment_ids > 0)


def test_steps_learn_and_share_one_compilation():
    state, objective, merge, optimizer = make(RouterConfig())
    step = make_train_step(objective, optimizer, merge)
    losses = []
    for _ in range(20):
        state, report = step(state, None, random_batch((2, 4, 16)))
        losses.append(float(report.scalars["train/loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert step._cache_size() == 1
    other = random_batch((2, 4, 16), seed=1)  # packed otherwise, the same function
    step(state, None, other)
    assert step._cache_size() == 1


def test_a_step_that_is_not_finite_leaves_the_state_and_says_so():
    state, objective, merge, optimizer = make()
    state = state._replace(params=jax.tree.map(jnp.copy, state.params))
    state.params["head"]["weight"] = state.params["head"]["weight"].at[0, 0].set(jnp.nan)
    step = make_train_step(objective, optimizer, merge)
    params = jax.tree.map(np.array, state.params)
    after, report = step(state, None, random_batch((1, 4, 16)))
    assert not bool(report.healthy) and int(after.step) == 0
    assert np.isnan(float(report.scalars["train/loss"]))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), after.params, params)))
