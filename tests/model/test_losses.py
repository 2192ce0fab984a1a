"""The chunked cross-entropy against the plain one, value and gradients, for every way of cutting (NUMERICS D2)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.losses import linear_cross_entropy, linear_logps
from tests.optional import torch
from tests.oracles import mixtral as oracle

M, D, V = 13, 6, 37
CHUNKS = (0, 1, 3, 4, 12, 13, 100)
ALL = np.ones(M, bool)


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(0)
    x, w = rng.normal(0, 1, (M, D)).astype(np.float32), rng.normal(0, 1, (D, V)).astype(np.float32)
    targets, weights = rng.integers(0, V, M).astype(np.int32), rng.random(M).astype(np.float32)
    weights[[0, 5, 12]] = 0
    targets[:6] = np.argmax(x[:6] @ w, axis=1)  # some are predicted right
    return x, w, targets, weights


@pytest.mark.parametrize("skip_masked", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients(numbers, chunk, skip_masked):
    x, w, targets, weights = numbers

    @jax.jit
    def run(x, w, targets, weights):
        def loss(x, w):
            sums = linear_cross_entropy(x, w, targets, weights, chunk=chunk, skip_masked=skip_masked)
            return 3 * sums.loss_sum, sums  # a factor, so that the incoming gradient is used

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)

    (_, sums), (dx, dw) = run(*numbers)
    tx, tw = oracle.tensors(x), oracle.tensors(w)
    want, _ = oracle.cross_entropy(tx, tw, targets.tolist(), weights.tolist())
    (3 * want).backward()
    assert abs(float(sums.loss_sum) - want.item()) <= 1e-6 * want.item()
    right = np.argmax(x @ w, axis=1) == targets
    assert 0 < right.sum() < M
    np.testing.assert_allclose(sums.correct_sum, weights[right].sum(), rtol=1e-6)
    np.testing.assert_allclose(dx, tx.grad, atol=3e-6)
    np.testing.assert_allclose(dw, tw.grad, atol=3e-6)
    assert not np.asarray(dx)[[0, 5, 12]].any()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_alone_is_the_loss_with_gradients(numbers, chunk):
    """Evaluation runs another function than training: they must agree."""
    x, w, targets, weights = numbers
    want, _ = oracle.cross_entropy(*map(torch.tensor, (x, w)), targets.tolist(), weights.tolist())
    for skip_masked in (False, True):
        run = jax.jit(partial(linear_cross_entropy, chunk=chunk, skip_masked=skip_masked))
        assert abs(float(run(*numbers).loss_sum) - want.item()) <= 3e-6 * want.item()


@partial(jax.jit, static_argnames=("chunk", "kind"))
def value_and_gradients(x, w, targets, weights, chunk, kind):
    def loss(x, w):
        if kind == "logps":
            return jnp.dot(linear_logps(x, w, targets, weights != 0, chunk=chunk).logp_M, -weights)
        return linear_cross_entropy(x, w, targets, weights, chunk=chunk, skip_masked=kind == "skip").loss_sum

    return jax.value_and_grad(loss, (0, 1))(x, w)


@pytest.mark.parametrize("wanted", [[], [0], [12], [3, 4, 5, 6], list(range(1, 13, 2)), list(range(13))], ids=str)
def test_what_is_not_wanted_costs_no_logits_and_changes_nothing(numbers, wanted):
    """Rows that nothing may read hold NaN: were their chunk computed, or one of them used, it would show."""
    x, w, targets, weights = numbers
    weights = np.where(np.isin(np.arange(M), wanted), 0.5 + weights, 0).astype(np.float32)
    want, (dx, dw) = value_and_gradients(x, w, targets, weights, 13, "plain")
    for kind in ("skip", "logps"):
        for chunk in (4, 13):
            # rows beside wanted ones are computed and thrown away: only whole chunks without any are skipped
            behind = np.argsort(weights == 0, stable=True)[-(-len(wanted) // chunk) * chunk :]
            given = x.copy()
            given[behind] = np.nan
            got, (dx_got, dw_got) = value_and_gradients(given, w, targets, weights, chunk, kind)
            np.testing.assert_allclose(got, want, rtol=3e-6)
            np.testing.assert_allclose(dx_got, dx, atol=3e-6)
            np.testing.assert_allclose(dw_got, dw, atol=3e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_entropy_of_the_prediction(numbers, chunk):
    """-sum p log p in fp64, in training and in evaluation, with padding columns; it changes nothing else."""
    x, w, targets, weights = numbers
    logits = x.astype(np.float64) @ w
    logps = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    want = weights @ -(np.exp(logps) * logps).sum(1)
    padded = np.pad(w, ((0, 0), (0, 3)), constant_values=1.0)

    def sums(x, w, entropy=True, vocab=None):
        found = linear_cross_entropy(x, w, targets, weights, chunk=chunk, entropy=entropy, vocab=vocab)
        return found.loss_sum, found

    plain = jax.jit(jax.value_and_grad(lambda x: sums(x, w, entropy=False), has_aux=True))(x)
    asked = jax.jit(jax.value_and_grad(lambda x: sums(x, w), has_aux=True))(x)
    for found in (asked[0][1], jax.jit(sums)(x, w)[1], jax.jit(lambda x: sums(x, padded, vocab=V)[1])(x)):
        np.testing.assert_allclose(found.entropy_sum, want, rtol=2e-6)
    assert plain[0][1].entropy_sum == 0
    # Two programs, which LLVM may round otherwise in the last bit.
    np.testing.assert_allclose(plain[0][0], asked[0][0], rtol=2e-7)
    np.testing.assert_allclose(plain[1], asked[1], atol=1e-7)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_log_probabilities_and_gradients(numbers, chunk):
    x, w, targets, g = numbers

    @jax.jit
    def run(x, w, targets, g):
        logps, pull = jax.vjp(lambda x, w: linear_logps(x, w, targets, ALL, chunk=chunk).logp_M, x, w)
        return logps, *pull(g)

    logps, dx, dw = run(*numbers)
    tx, tw = oracle.tensors(x), oracle.tensors(w)
    _, want = oracle.cross_entropy(tx, tw, targets.tolist(), g.tolist())
    want.backward(torch.tensor(g, dtype=torch.float64))
    assert logps.shape == (M,) and logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, want.detach(), atol=2e-6)
    np.testing.assert_allclose(dx, tx.grad, atol=2e-6)
    np.testing.assert_allclose(dw, tw.grad, atol=3e-6)


def test_greedy_choices_are_known(numbers):
    x, w, targets, _ = numbers
    best, wanted = np.asarray(x @ w).argmax(axis=1), np.arange(M) % 3 > 0
    targets = np.where(np.arange(M) % 2, best, targets)
    found = linear_logps(x, w, targets, wanted, chunk=4).best_M
    np.testing.assert_array_equal(found, wanted & (targets == best))


def test_large_logits_do_not_overflow():
    x, w = jnp.full((2, 1), 1e4), jnp.asarray([[1.0, -1.0, 0.5]])
    targets = jnp.asarray([0, 1])
    run = jax.jit(jax.value_and_grad(lambda x: linear_cross_entropy(x, w, targets, jnp.ones(2)).loss_sum))
    loss, grad = run(x)
    assert float(loss) == 2e4 and np.isfinite(grad).all()
    np.testing.assert_allclose(linear_logps(x, w, targets, jnp.ones(2, bool)).logp_M, [0, -2e4])


def test_all_weights_zero_gives_zero(numbers):
    x, w, targets, _ = numbers
    run = jax.value_and_grad(lambda x: linear_cross_entropy(x, w, targets, jnp.zeros(M), chunk=4).loss_sum)
    loss, grad = jax.jit(run)(x)
    assert float(loss) == 0 and not np.asarray(grad).any()


def _shapes(jaxpr):
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield var.aval.shape
        for param in eqn.params.values():
            for sub in param if isinstance(param, (list, tuple)) else [param]:
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)


@pytest.mark.parametrize("which", ["loss", "logps"])
def test_full_logits_are_never_held(numbers, which):
    x, w, targets, weights = numbers

    def loss(x, w, chunk):
        if which == "loss":
            return linear_cross_entropy(x, w, targets, weights, chunk=chunk).loss_sum
        return jnp.sum(linear_logps(x, w, targets, ALL, chunk=chunk).logp_M)

    def largest(chunk):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, w: loss(x, w, chunk), argnums=(0, 1)))(x, w)
        return max(int(np.prod(s)) for s in _shapes(jaxpr.jaxpr) if V in s and D not in s)

    assert largest(4) == 4 * V
    assert largest(13) == 13 * V


def test_bfloat16(numbers):
    """Operands in bf16, everything after the product in fp32."""
    x, w, targets, weights = numbers
    xb, wb = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    run = jax.jit(jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, targets, weights).loss_sum, (0, 1)))
    loss, (dx, dw) = run(xb, wb)
    tx, tw = (oracle.tensors(np.asarray(a, np.float32)) for a in (xb, wb))
    want, _ = oracle.cross_entropy(tx, tw, targets.tolist(), weights.tolist())
    want.backward()
    assert loss.dtype == jnp.float32 and dx.dtype == dw.dtype == jnp.bfloat16
    assert abs(float(loss) - want.item()) <= 1e-6 * want.item()
    np.testing.assert_allclose(np.asarray(dx, np.float32), tx.grad, atol=2e-2)
    np.testing.assert_allclose(np.asarray(dw, np.float32), tw.grad, atol=2e-2)


def test_log_probabilities_in_bfloat16_add_up_the_gradient_of_w_in_fp32():
    """Many chunks: sums rounded to bf16 after each of them would be off by several of its steps."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(0, 1, shape), jnp.bfloat16) for shape in ((512, D), (D, V)))
    targets, g = rng.integers(0, V, 512).astype(np.int32), jnp.ones(512)
    run = jax.jit(
        lambda w, chunk: jax.vjp(lambda w: linear_logps(x, w, targets, g > 0, chunk=chunk).logp_M, w)[1](g)[0],
        static_argnums=1,
    )
    np.testing.assert_allclose(
        np.asarray(run(w, 4), np.float32), np.asarray(run(w, 512), np.float32), rtol=2**-7, atol=0.02
    )
