"""The router against a loop over tokens (NUMERICS B5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.moe.router import route
from tests.optional import torch
from tests.oracles import mixtral as oracle

ROUTE = jax.jit(route, static_argnums=(2, 3))


def draw(tokens=40, dim=16, experts=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (tokens, dim)).astype(np.float32), rng.normal(0, 0.5, (dim, experts)).astype(np.float32)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_value_and_gradients(top_k):
    x, w = draw()
    g_gate = np.random.default_rng(1).normal(0, 1, (40, top_k)).astype(np.float32)

    @jax.jit
    def run(x, w):
        routing, pull = jax.vjp(lambda x, w: route(x, w, top_k).gate_MC, x, w)
        return routing, route(x, w, top_k), pull(g_gate)

    _, got, grads = run(x, w)
    tx, tw = oracle.tensors(x), oracle.tensors(w)
    gates, chosen = [], []
    for row in tx:
        probs = torch.softmax(row @ tw, 0)
        best = oracle.choose(probs, top_k)
        chosen.append(best)
        gates.append(torch.stack([probs[e] / sum(probs[i] for i in best) for e in best]))
    gates = torch.stack(gates)
    gates.backward(torch.tensor(g_gate, dtype=torch.float64))
    np.testing.assert_array_equal(got.expert_MC, chosen)
    np.testing.assert_allclose(got.gate_MC, gates.detach(), atol=3e-7)
    np.testing.assert_allclose(got.probs_ME, torch.softmax(tx @ tw, -1).detach(), atol=3e-7)
    for got_grad, t in zip(grads, (tx, tw), strict=True):
        np.testing.assert_allclose(got_grad, t.grad, atol=1e-6)


def test_renormalised_softmax_is_the_papers_softmax_over_the_top_logits():
    x, w = draw(tokens=2000)
    got = ROUTE(x, w, 2, jnp.float32)
    top = np.take_along_axis(np.asarray(got.logits_ME), np.asarray(got.expert_MC), axis=1)
    paper = np.asarray(jax.nn.softmax(top, axis=-1))
    assert np.abs(got.gate_MC - paper).max() <= 2.4e-7  # two units in the last place of numbers below 1
    np.testing.assert_allclose(np.sum(got.gate_MC, axis=-1), 1, atol=1.2e-7)


def test_ties_go_to_the_lowest_index():
    w = np.zeros((4, 6), np.float32)
    w[0] = [1, 3, 2, 3, 3, 2]
    got = ROUTE(np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32), w, 4, jnp.float32)
    np.testing.assert_array_equal(got.expert_MC, [[1, 3, 4, 2], [0, 1, 2, 3]])


def test_logits_are_fp32_also_for_bf16_activations():
    x, w = draw()
    x = jnp.asarray(x, jnp.bfloat16)
    got, rounded = ROUTE(x, w, 2, jnp.float32), ROUTE(x, w, 2, jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ w.astype(np.float64)
    assert got.logits_ME.dtype == got.gate_MC.dtype == rounded.gate_MC.dtype == jnp.float32
    np.testing.assert_allclose(got.logits_ME, exact, atol=2e-6)
    assert 1e-4 < np.abs(rounded.logits_ME - exact).max() < 0.1  # router_dtype: compute rounds the weights


def test_extreme_logits_give_finite_gates_and_gradients():
    w = np.array([[300.0, -300.0, 100.0]], np.float32)
    gate, grad = jax.value_and_grad(lambda w: route(jnp.ones((1, 1)), w, 2).gate_MC[0, 0])(w)
    assert float(gate) == 1.0 and np.isfinite(grad).all()
