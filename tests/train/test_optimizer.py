"""AdamW against its definition, schedules at their corners, and the guard around the update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.train.optimizer import (
    SPIKE_WARMUP,
    OptimizerConfig,
    RatePart,
    apply_gradients,
    decay_mask,
    init_optimizer,
    make_optimizer,
    make_schedule,
)
from tests.oracles.adamw import adamw
from tests.oracles.schedules import learning_rates

SHAPES = {"layers": {"moe": {"w2": (2, 3, 4, 5)}, "norm": {"scale": (2, 5)}}, "head": {"weight": (5, 7)}}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.standard_normal(shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def updates(config, steps, gradients, losses=None):
    """Parameters, states and reports after each of the gradients."""
    optimizer = make_optimizer(config, steps)
    params = jax.tree.map(jnp.asarray, random_tree(0))
    state = init_optimizer(optimizer, params)
    step = jax.jit(lambda p, s, g, loss, n: apply_gradients(optimizer, p, s, g, loss, n))
    history = []
    for i, g in enumerate(gradients):
        loss = jnp.float32(1.0 if losses is None else losses[i])
        applied = step(params, state, g, loss, jnp.int32(i + 1))
        params, state = applied.params, applied.state
        history.append(applied)
    return history


def test_five_updates_are_those_of_the_definition():
    config = OptimizerConfig(
        learning_rate=0.03, schedule="constant", weight_decay=0.2, b1=0.8, b2=0.9, eps=1e-6, max_grad_norm=5.0
    )
    gradients = [random_tree(i, scale=i) for i in range(1, 6)]
    got = updates(config, 10, gradients)[-1].params
    expected = jax.tree.map(np.float64, random_tree(0))
    m = v = jax.tree.map(np.zeros_like, expected)
    for t, g in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x, norm=norm: np.float64(x) * min(1.0, 5.0 / norm), g)
        triples = jax.tree_util.tree_map_with_path(
            lambda path, p, m, v, g, t=t: adamw(
                p, m, v, g, t, lr=0.03, b1=0.8, b2=0.9, eps=1e-6, decay=0.0 if path[-1].key == "scale" else 0.2
            ),
            expected,
            m,
            v,
            g,
        )
        expected, m, v = jax.tree.transpose(jax.tree.structure(g), jax.tree.structure((0, 0, 0)), triples)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_matrices_decay_and_norm_scales_do_not():
    assert decay_mask(random_tree(0)) == {
        "layers": {"moe": {"w2": True}, "norm": {"scale": False}},
        "head": {"weight": True},
    }


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # update n = 1, 5 (half of the warm-up), 10 (its end), 60 (half of the rest), 110 (the last)
        ("constant", {1: 0.1, 5: 0.5, 10: 1, 60: 1, 110: 1}),
        ("linear", {1: 0.1, 5: 0.5, 10: 1, 60: 0.6, 85: 0.4, 110: 0.2}),
        ("cosine", {1: 0.1, 5: 0.5, 10: 1, 60: 0.6, 85: 0.2 + 0.8 * 0.5 * (1 + np.cos(0.75 * np.pi)), 110: 0.2}),
        ("wsd", {1: 0.1, 10: 1, 60: 1, 90: 1, 100: 0.6, 110: 0.2}),
    ],
)
def test_schedules(schedule, expected):
    config = OptimizerConfig(
        learning_rate=2.0, schedule=schedule, warmup_steps=10, final_learning_rate_fraction=0.2,
        decay_steps=20 if schedule == "wsd" else None,
    )  # fmt: skip
    rate = make_schedule(config, 110)
    for n, fraction in expected.items():
        assert float(rate(jnp.int32(n))) == pytest.approx(2.0 * fraction, rel=1e-6), n


def test_warmup_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer\.warmup_steps \(11\) is larger than steps \(10\)"):
        make_schedule(OptimizerConfig(warmup_steps=11), 10)
    with pytest.raises(ValueError, match=r"warmup_steps \(5\) \+ optimizer\.decay_steps \(6\) is larger than steps"):
        make_schedule(OptimizerConfig(schedule="wsd", warmup_steps=5, decay_steps=6), 10)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_changes_at_or_after_a_step_that_is_not_finite(bad, value):
    gradients = [random_tree(i) for i in (1, 2, 3)]
    losses = [1.0, value if bad == "loss" else 1.0, 1.0]
    if bad == "gradient":
        gradients[1]["head"]["weight"][0, 0] = value
    good, broken, after = updates(OptimizerConfig(), 10, gradients, losses)
    assert bool(good.state.healthy)
    assert not bool(broken.state.healthy) and not bool(after.state.healthy)
    for later in (broken, after):
        same = jax.tree.map(lambda a, b: bool((a == b).all()), good.params, later.params)
        assert all(jax.tree.leaves(same))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), good.state.moments, later.state.moments)
        assert all(jax.tree.leaves(same))


def test_a_spike_is_skipped_and_the_run_goes_on():
    gradients = [random_tree(i) for i in range(SPIKE_WARMUP + 2)]
    gradients[SPIKE_WARMUP] = random_tree(99, scale=10.0)
    config = OptimizerConfig(skip_spikes=3.0, max_grad_norm=None)
    history = updates(config, 100, gradients)
    assert [i for i, applied in enumerate(history) if bool(applied.skipped)] == [SPIKE_WARMUP]
    before, spike, after = history[-3:]
    np.testing.assert_array_equal(before.params["head"]["weight"], spike.params["head"]["weight"])
    assert bool(after.state.healthy)
    assert float(jnp.max(jnp.abs(after.params["head"]["weight"] - spike.params["head"]["weight"]))) > 0
    without = updates(config.model_copy(update={"skip_spikes": None}), 100, gradients)
    assert not any(bool(applied.skipped) for applied in without)


def norms(values, **settings):
    """The reports of updates with gradients of these norms."""
    unit = random_tree(1)
    size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(unit)))
    gradients = [jax.tree.map(lambda x, norm=norm: x * np.float32(norm / size), unit) for norm in values]
    return updates(OptimizerConfig(max_grad_norm=None, **settings), 1000, gradients)


@pytest.mark.parametrize(("factor", "rise"), [(3.0, 1.4), (1.5, 0.7), (10.0, 6.0)])
def test_a_lasting_rise_is_learned_from_what_is_skipped(factor, rise):
    history = norms([0.4] * 30 + [rise] * 30, skip_spikes=factor)
    skipped = [i for i, applied in enumerate(history) if bool(applied.skipped)]
    assert skipped == list(range(30, 30 + len(skipped)))  # in a row, and then no more
    assert 0 < len(skipped) < OptimizerConfig().max_skips


@pytest.mark.parametrize("at", [0, 1, 10, 30])
def test_a_single_spike_does_not_spoil_the_mean(at):
    """Nor one so early that it is no spike yet; the very first update is all that there is to compare with."""
    values = [0.4] * 80
    values[at] = 1e12 if at else 4.0
    values[60] = 2.0
    history = norms(values, skip_spikes=3.0)
    assert [i for i, applied in enumerate(history) if bool(applied.skipped)] == [*([30] if at == 30 else []), 60]


def test_a_batch_without_targets_says_nothing_of_the_mean():
    history = norms([0.0] * 30 + [0.4] * 30 + [0.0] * 60 + [0.4] * 5 + [1.4], skip_spikes=3.0)
    assert [i for i, applied in enumerate(history) if bool(applied.skipped)] == [125]


def test_the_update_works_in_place():
    """Donated parameters and moments are updated where they lie: the compiled update holds no copy of them."""
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params = {"w": {"weight": jnp.ones((512, 1024))}, "n": {"scale": jnp.ones(1024)}}
    state = init_optimizer(optimizer, params)

    def update(params, state, grads):
        applied = apply_gradients(optimizer, params, state, grads, jnp.float32(1), jnp.int32(1))
        return applied.params, applied.state

    memory = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
    size = 512 * 1024 * 4
    assert memory.alias_size_in_bytes >= 3 * size
    assert memory.temp_size_in_bytes < 0.1 * size


@pytest.mark.parametrize(
    "changes",
    [
        {"router_factor": 0.1}, {"router_factor": 0.0}, {"weight_decay": 0.0}, {"skip_spikes": 3.0}, {"b1": 0.0},
        {"schedule": "wsd", "decay_steps": 2}, {"schedule": "constant", "learning_rate": 1.0}, {"max_grad_norm": None},
        {"warmup_steps": 3, "final_learning_rate_fraction": 1.0, "b2": 0.5, "eps": 1.0},
    ],
)  # fmt: skip
def test_a_run_may_resume_with_any_other_setting(changes):
    """The tree of the state, which a checkpoint holds, is the same for all."""

    def state(router_factor=1.0, **settings):
        optimizer = make_optimizer(OptimizerConfig(**settings), 10, router_factor)
        return jax.eval_shape(lambda: init_optimizer(optimizer, jax.tree.map(jnp.asarray, random_tree(0))))

    assert jax.tree.structure(state(**changes)) == jax.tree.structure(state())


def test_phases_parts_of_the_schedule_are_those_of_the_definition():
    """Every kind behind every other, also right behind the warm-up; by the slow twin, and exact at the borders."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        steps, own = int(rng.integers(20, 60)), str(rng.choice(["constant", "linear", "cosine", "wsd"]))
        warmup = int(rng.integers(0, 8))
        begins = sorted({int(x) for x in rng.integers(warmup, steps, rng.integers(1, 4))})
        kinds = [str(rng.choice(["constant", "linear", "cosine", "sqrt"])) for _ in begins]
        parts = [(b, kind, float(rng.choice([0.0, 0.1, 0.5, 1.0]))) for b, kind in zip(begins, kinds, strict=True)]
        config = OptimizerConfig(learning_rate=2.0, schedule=own, warmup_steps=warmup, final_learning_rate_fraction=0.2)
        rate = make_schedule(config, steps, [RatePart(*part) for part in parts])
        expected = learning_rates(steps, 2.0, warmup, own, None, 0.2, parts)
        got = np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(1, steps + 1)))
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6, err_msg=f"{config} {parts}")
        for (_, kind, fraction), end in zip(parts, [*begins[1:], steps], strict=True):
            if kind != "constant":
                assert got[end - 1] == np.float32(2.0 * fraction)
