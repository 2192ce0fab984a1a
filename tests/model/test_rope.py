"""Rotary embedding against pairwise rotations (NUMERICS B2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.layers import apply_rope, rope_angles
from tests.optional import torch
from tests.oracles import mixtral as oracle


def rotate(x_BTNH, positions_BT, theta):
    return apply_rope(x_BTNH, rope_angles(positions_BT, x_BTNH.shape[-1], theta))


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_value_and_gradient(theta):
    rng = np.random.default_rng(0)
    x, g = rng.normal(0, 1, (2, 2, 5, 3, 10))
    positions = np.array([[0, 1, 2, 300, 4000], [0, 1, 0, 1, 2]], np.int32)
    y, pull = jax.vjp(lambda x: rotate(x, jnp.asarray(positions), theta), jnp.asarray(x, jnp.float32))
    tx = torch.tensor(x, requires_grad=True)
    want = torch.stack([
        torch.stack([torch.stack([oracle.rotate(h, int(positions[b, t]), theta) for h in tx[b, t]]) for t in range(5)])
        for b in range(2)
    ])  # fmt: skip
    want.backward(torch.tensor(g))
    # angles of thousands of radians in fp32 are good to 4000 * 6e-8 = 2.4e-4; small positions to rounding
    small = positions < 100
    np.testing.assert_allclose(np.asarray(y)[small], want.detach().numpy()[small], atol=1e-6)
    np.testing.assert_allclose(y, want.detach(), atol=2e-3)
    np.testing.assert_allclose(
        np.asarray(pull(jnp.asarray(g, jnp.float32))[0])[small], tx.grad.numpy()[small], atol=1e-6
    )


def test_halves_are_paired_not_neighbours():
    x = jnp.zeros((1, 1, 1, 8)).at[0, 0, 0, 1].set(1.0)
    y = np.asarray(rotate(x, jnp.asarray([[1]]), 1e4))[0, 0, 0]
    assert set(np.flatnonzero(np.abs(y) > 1e-6)) == {1, 5}


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = jnp.asarray(rng.normal(0, 1, (2, 1, 1, 1, 16)), jnp.float32)

    def score(p, s):
        return float(jnp.sum(rotate(q, jnp.asarray([[p]]), 1e4) * rotate(k, jnp.asarray([[s]]), 1e4)))

    assert abs(score(7, 3) - score(104, 100)) < 1e-4
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_bfloat16_is_rotated_in_fp32():
    """At position 32,000 an angle in bf16 would be wrong by whole turns."""
    x = jnp.asarray(np.random.default_rng(2).normal(0, 1, (1, 1, 2, 16)), jnp.bfloat16)
    positions = jnp.asarray([[32000]])
    y = rotate(x, positions, 1e6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, rotate(x.astype(jnp.float32), positions, 1e6).astype(jnp.bfloat16))
