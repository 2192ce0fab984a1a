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
    h, gate, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((R, 2 * F), R, (3, F, D), (R, D)))
    used, sizes = sum(sizes), jnp.array(sizes)
    bad = [x.copy() for x in (h, gate, g)]
    for x in bad:
        x[used:] = np.nan  # rows of nobody
    for x in (h, gate, g):
        x[used:] = 0

    def behind(h, gate, w):
        """The gate behind the product, as the definition has it."""
        return gate[:, None] * grouped_matmul(swiglu(h), w, sizes, backend="dense")

    y, pull = jax.vjp(lambda *a: grouped_down(*a, sizes, backend="blocked"), *bad[:2], w)
    expected, pull_expected = jax.vjp(behind, h, gate, w)
    np.testing.assert_allclose(y[:used], expected[:used], atol=1e-5)
    for ours, theirs in zip(pull(bad[2]), pull_expected(g), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_the_activation_comes_back_with_the_gradient():
    rng = np.random.default_rng(1)
    h, da, gate = (rng.standard_normal(s).astype(np.float32) for s in ((R, 2 * F), (R, F), R))
    got = gradient_in_place(h, da, gate, jnp.array(R))
    expected, pull = jax.vjp(swiglu, h, gate)
    np.testing.assert_allclose(got.a_RF, expected, atol=1e-6)
    for ours, theirs in zip((got.dh_R2F, got.dgate_R), pull(da), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
