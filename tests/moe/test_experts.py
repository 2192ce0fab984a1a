"""The experts' SwiGLU against a loop over rows (NUMERICS B6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import grouped as kernel
from mixtral_jax.kernels.activation import swiglu
from mixtral_jax.kernels.swiglu_blocked import Low, blocked_swiglu
from mixtral_jax.moe.experts import ExpertWeights, dense_swiglu, grouped_swiglu
from tests.optional import often, torch
from tests.oracles import mixtral as oracle

R, D, F, E = 21, 6, 10, 4
SIZES = np.array([5, 0, 9, 3], np.int32)  # 4 rows are nobody's


def draw():
    rng = np.random.default_rng(0)
    shapes = (R, D), R, (E, D, 2, F), (E, F, D), (R, D)
    return [rng.normal(0, 0.7, s).astype(np.float32) for s in shapes]


def value_and_gradients(x, gate, w13, w2, g, backend="blocked"):
    inside = (np.arange(R) < SIZES.sum())[:, None]

    def run(x, gate, w13, w2):
        return jnp.where(inside, grouped_swiglu(x, gate, ExpertWeights(w13, w2), jnp.asarray(SIZES), backend), 0)

    y, pull = jax.vjp(run, x, gate, w13, w2)
    return y, *pull(g)


def check(got, numbers):
    x, gate, w13, w2 = map(oracle.tensors, numbers[:4])
    group = np.repeat(np.arange(E), SIZES)
    rows = [gate[r] * oracle.expert(x[r], w13[e], w2[e]) for r, e in enumerate(group)]
    want = torch.stack([*rows, *[torch.zeros(D, dtype=torch.float64)] * (R - len(rows))])
    want.backward(torch.tensor(numbers[4], dtype=torch.float64))
    np.testing.assert_allclose(got[0], want.detach(), atol=2e-6)
    inside = np.arange(R) < SIZES.sum()
    got = [*got[:2], np.where(inside, got[2], 0), *got[3:]]  # a gate of nobody has no gradient that means anything
    for grad, t in zip(got[1:], (x, gate, w13, w2), strict=True):
        np.testing.assert_allclose(grad, t.grad, atol=1e-5)


@pytest.mark.parametrize("backend", ["blocked", "ragged_dot", "dense"])
def test_value_and_gradients(backend):
    numbers = draw()
    check(jax.jit(lambda *a: value_and_gradients(*a, backend))(*numbers), numbers)


@pytest.mark.parametrize("sizes", [(300, 0, 129, 64), (0, 0, 0, 493), (1, 127, 192, 65), (0, 0, 0, 0)])
def test_blocks_of_both_sizes_and_rows_of_nobody(sizes):
    """Groups above, at and below the sizes of the blocks; what lies behind them is NaN and reaches nothing."""
    rows, rng = 500, np.random.default_rng(1)
    shapes = (rows, D), (rows, 1), (E, D, 2, F), (E, F, D), (rows, D)
    x, gate, w13, w2, g = (rng.normal(0, 0.5, s).astype(np.float32) for s in shapes)
    inside = (np.arange(rows) < sum(sizes))[:, None]
    x, gate, g = (np.where(inside, a, np.nan) for a in (x, gate, g))
    y, pull = jax.vjp(lambda *a: blocked_swiglu(*a, jnp.asarray(sizes, jnp.int32)), x, gate[:, 0], w13, w2)
    dx, dgate, dw13, dw2 = pull(jnp.asarray(g))
    group = np.repeat(np.arange(E), sizes)
    tx, tgate, t13, t2 = map(oracle.tensors, (np.nan_to_num(x), np.nan_to_num(gate[:, 0]), w13, w2))
    want = [tgate[r] * oracle.expert(tx[r], t13[e], t2[e]) for r, e in enumerate(group)]
    if want:
        torch.stack(want).backward(torch.tensor(g[: len(want)], dtype=torch.float64))
        np.testing.assert_allclose(y[: len(want)], torch.stack(want).detach(), atol=2e-6)
    for grad, t in ((dx, tx), (np.where(inside[:, 0], dgate, 0), tgate), (dw13, t13), (dw2, t2)):
        np.testing.assert_allclose(grad, np.zeros(t.shape) if t.grad is None else t.grad, atol=2e-5)


def low_rank_numbers(rng, rank=3):
    """Factors of w13 and of w2."""
    pairs = [(E, D, rank), (E, rank, 2 * F)], [(E, F, rank), (E, rank, D)]
    return [Low(*(rng.normal(0, 0.5, s).astype(np.float32) for s in pair)) for pair in pairs]


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("sizes", often([(300, 0, 129, 64), (700, 1, 0, 40)], lambda sizes: sizes[0] == 300))
def test_low_rank_factors_equal_their_merged_matrices(sizes, which):
    """Value, and the gradients of x, of the factors (by the chain rule through W + A B) and of the matrices."""
    rows, rng = 750, np.random.default_rng(2)
    x, w13, w2, g = (rng.normal(0, 0.5, s).astype(np.float32) for s in ((rows, D), (E, D, 2, F), (E, F, D), (rows, D)))
    inside, gate = (np.arange(rows) < sum(sizes))[:, None], rng.random(rows).astype(np.float32)
    x, g = np.where(inside, x, np.nan), jnp.where(inside, g, np.nan)
    lows = [low if given else None for low, given in zip(low_rank_numbers(rng), which, strict=True)]
    count = jnp.asarray(sizes, jnp.int32)

    def merged(x, w13, w2, low13, low2):
        w13 = w13 if low13 is None else w13 + jnp.matmul(*low13).reshape(w13.shape)
        return blocked_swiglu(x, gate, w13, w2 if low2 is None else w2 + jnp.matmul(*low2), count)

    y, pull = jax.vjp(lambda x, w13, w2, *low: blocked_swiglu(x, gate, w13, w2, count, *low), x, w13, w2, *lows)
    want, want_pull = jax.vjp(merged, x, w13, w2, *lows)
    np.testing.assert_allclose(y[: sum(sizes)], want[: sum(sizes)], atol=5e-6)
    got, wanted = jax.tree.leaves(pull(g)), jax.tree.leaves(want_pull(g))
    assert len(got) == len(wanted) == 3 + 2 * sum(which)
    for grad, want_grad in zip(got, wanted, strict=True):
        assert np.linalg.norm(grad - want_grad) <= 2e-6 * np.linalg.norm(want_grad)


@pytest.mark.parametrize("trained", ["w13", "w2", "low13", "low2", "x"])
def test_no_product_is_computed_for_what_is_frozen(trained):
    """Also where the matrices are slices of a stack of layers, rematerialised, as in the model."""
    x, gate, w13, w2, _ = draw()
    low13, low2 = low_rank_numbers(np.random.default_rng(3))
    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), dict(w13=w13, w2=w2, low13=low13, low2=low2))

    @jax.checkpoint
    def layer(x, w):
        return blocked_swiglu(x, gate, w["w13"], w["w2"], jnp.asarray(SIZES), w["low13"], w["low2"]), None

    def loss(part):
        own = {"x": x, **layers, trained: part}
        return jnp.sum(jax.lax.scan(layer, own.pop("x"), own)[0])

    program = str(jax.make_jaxpr(jax.grad(loss))(x if trained == "x" else layers[trained]))
    shapes = {"w13": (D, 2 * F), "w2": (D, F), "low13": (D, 3), "low2": (F, 3)}
    made = {name for name, (m, n) in shapes.items() if f":f32[{m},{n}] = dot_general" in program}
    assert made == {trained} - {"x"}


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
    x, _, w13, w2, g = draw()
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
