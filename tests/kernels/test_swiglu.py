"""SwiGLU and its product with a backward pass in place, against the two functions left to autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import activation as module
from mixtral_jax.kernels.activation import gradient_in_place, grouped_down, swiglu
from mixtral_jax.kernels.grouped import grouped_matmul

R, F, D = 96, 20, 12


@pytest.mark.parametrize("chunk", [32, 1024, 7])  # whole chunks, none, and a shorter one behind them
@pytest.mark.parametrize("sizes", [(40, 0, 56), (10, 30, 7), (0, 0, 0)])
def test_values_and_gradients_are_those_of_autodiff(monkeypatch, chunk, sizes):
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    h, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((R, 2 * F), (3, F, D), (R, D)))
    used, sizes = sum(sizes), jnp.array(sizes)
    h_bad, g_bad = h.copy(), g.copy()
    h_bad[used:], g_bad[used:] = np.nan, np.nan  # rows of nobody
    h[used:], g[used:] = 0, 0

    y, pull = jax.vjp(lambda h, w: grouped_down(h, w, sizes, backend="blocked"), h_bad, w)
    expected, pull_expected = jax.vjp(lambda h, w: grouped_matmul(swiglu(h), w, sizes, backend="dense"), h, w)
    np.testing.assert_allclose(y[:used], expected[:used], atol=1e-5)
    for ours, theirs in zip(pull(g_bad), pull_expected(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_activation_comes_back_with_the_gradient():
    rng = np.random.default_rng(1)
    h, da = (rng.standard_normal(s).astype(np.float32) for s in ((R, 2 * F), (R, F)))
    dh, a = gradient_in_place(h, da, jnp.array(R))
    expected, pull = jax.vjp(swiglu, h)
    np.testing.assert_allclose(a, expected, atol=1e-6)
    np.testing.assert_allclose(dh, pull(da)[0], atol=1e-5)
