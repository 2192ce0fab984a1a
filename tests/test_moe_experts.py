"""The experts' SwiGLU against a loop over rows (NUMERICS B6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mixtral_jax.kernels import grouped_matmul as kernel
from mixtral_jax.kernels.blocked_swiglu import blocked_swiglu
from mixtral_jax.moe.experts import ExpertWeights, dense_swiglu, grouped_swiglu, swiglu
from tests.oracles import mixtral as oracle

R, D, F, E = 21, 6, 10, 4
SIZES = np.array([5, 0, 9, 3], np.int32)  # 4 rows are nobody's


def draw():
    rng = np.random.default_rng(0)
    shapes = (R, D), (E, D, 2, F), (E, F, D), (R, D)
    return [rng.normal(0, 0.7, s).astype(np.float32) for s in shapes]


def value_and_gradients(x, w13, w2, g, backend="blocked"):
    inside = (np.arange(R) < SIZES.sum())[:, None]

    def run(x, w13, w2):
        return jnp.where(inside, grouped_swiglu(x, ExpertWeights(w13, w2), jnp.asarray(SIZES), backend), 0)

    y, pull = jax.vjp(run, x, w13, w2)
    return y, *pull(g)


def check(got, numbers):
    x, w13, w2 = map(oracle.tensors, numbers[:3])
    group = np.repeat(np.arange(E), SIZES)
    rows = [oracle.expert(x[r], w13[e], w2[e]) for r, e in enumerate(group)]
    want = torch.stack([*rows, *[torch.zeros(D, dtype=torch.float64)] * (R - len(rows))])
    want.backward(torch.tensor(numbers[3], dtype=torch.float64))
    np.testing.assert_allclose(got[0], want.detach(), atol=2e-6)
    for grad, t in zip(got[1:], (x, w13, w2), strict=True):
        np.testing.assert_allclose(grad, t.grad, atol=1e-5)


@pytest.mark.parametrize("backend", ["blocked", "ragged_dot", "dense"])
def test_value_and_gradients(backend):
    numbers = draw()
    check(jax.jit(lambda *a: value_and_gradients(*a, backend))(*numbers), numbers)


@pytest.mark.parametrize("sizes", [(300, 0, 129, 64), (0, 0, 0, 493), (1, 127, 192, 65), (0, 0, 0, 0)])
def test_blocks_of_both_sizes_and_rows_of_nobody(sizes):
    """Groups above, at and below the sizes of the blocks; what lies behind them is NaN and reaches nothing."""
    rows, rng = 500, np.random.default_rng(1)
    x, w13, w2, g = (rng.normal(0, 0.5, s).astype(np.float32) for s in ((rows, D), (E, D, 2, F), (E, F, D), (rows, D)))
    inside = (np.arange(rows) < sum(sizes))[:, None]
    x, g = np.where(inside, x, np.nan), np.where(inside, g, np.nan)
    y, pull = jax.vjp(lambda *a: blocked_swiglu(*a, jnp.asarray(sizes, jnp.int32)), x, w13, w2)
    dx, dw13, dw2 = pull(jnp.asarray(g))
    group = np.repeat(np.arange(E), sizes)
    tx, t13, t2 = map(oracle.tensors, (np.nan_to_num(x), w13, w2))
    want = [oracle.expert(tx[r], t13[e], t2[e]) for r, e in enumerate(group)]
    if want:
        torch.stack(want).backward(torch.tensor(g[: len(want)], dtype=torch.float64))
        np.testing.assert_allclose(y[: len(want)], torch.stack(want).detach(), atol=2e-6)
    for grad, t in ((dx, tx), (dw13, t13), (dw2, t2)):
        np.testing.assert_allclose(grad, np.zeros(t.shape) if t.grad is None else t.grad, atol=2e-5)


def test_a_backend_that_leaves_nan_behind_the_groups(monkeypatch):
    """Back-ends may leave anything in the rows of nobody, in y and in dx: no value and no gradient may see it."""
    forward, calls = kernel._forward, []

    def careless(backend, x, w, sizes, *args, **kwargs):
        calls.append(x.shape)
        y = forward(backend, x, w, sizes, *args, **kwargs)
        return jnp.where((jnp.arange(y.shape[0]) < jnp.sum(sizes))[:, None], y, jnp.nan)

    monkeypatch.setattr(kernel, "_forward", careless)
    numbers = draw()
    check(jax.jit(lambda *a: value_and_gradients(*a, "dense"))(*numbers), numbers)
    assert len(calls) >= 4  # two products forward, two backward


def test_dense_is_one_expert():
    x, w13, w2, g = draw()
    y, pull = jax.vjp(lambda x, w13, w2: dense_swiglu(x, ExpertWeights(w13[None], w2[None])), x, w13[0], w2[0])
    tensors = [oracle.tensors(a) for a in (x, w13[0], w2[0])]
    want = oracle.expert(*tensors)
    want.backward(torch.tensor(g, dtype=torch.float64))
    np.testing.assert_allclose(y, want.detach(), atol=2e-6)
    for grad, t in zip(pull(g), tensors, strict=True):
        np.testing.assert_allclose(grad, t.grad, atol=1e-5)


def test_gate_comes_first_and_is_computed_in_fp32():
    h = jnp.asarray([[3.0, 0.0, 2.0, 5.0]], jnp.bfloat16)  # [w1 x, w3 x]
    silu = 3 / (1 + np.exp(-3))
    got = swiglu(h)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray([[silu * 2, 0.0]], jnp.bfloat16))
