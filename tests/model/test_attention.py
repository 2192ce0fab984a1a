"""The attention module against a loop over queries, heads and keys (NUMERICS B3, B4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.attention import Attention, attend_row
from mixtral_jax.config import MixtralConfig
from mixtral_jax.kernels.attention_tiled import Tokens
from mixtral_jax.layers import rope_angles
from tests.optional import torch
from tests.oracles import mixtral as oracle

THETA = 1e4
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 0]], np.int32)
SEGMENTS = np.array([[1] * 7, [1, 1, 1, 2, 2, 2, 0]], np.int32)  # two documents and padding in the second row


def module(heads, kv_heads, head_dim):
    config = MixtralConfig(
        vocab_size=8, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, initializer_range=0.4,
    )  # fmt: skip
    return Attention(config, key=jax.random.key(3), dtype=jnp.float32)


def run_module(attention, x, head_dim, window, backend):
    tokens = Tokens(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
    angles = rope_angles(tokens.positions, head_dim, THETA)
    return attention(x, angles, attend_row(tokens, window, backend))[0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(4, 2, 6, None), (3, 1, 4, 2), (2, 2, 10, 1), (6, 3, 2, 3)]
)
def test_value_and_gradients(heads, kv_heads, head_dim, window):
    attention = module(heads, kv_heads, head_dim)
    x, g = np.random.default_rng(0).normal(0, 1, (2, 2, 7, 12)).astype(np.float32)

    @jax.jit
    def run(attention, x):
        y, pull = jax.vjp(lambda m, x: run_module(m, x, head_dim, window, "reference"), attention, x)
        return y, pull(jnp.asarray(g))

    y, (got, dx) = run(attention, x)
    names = ("query", "key", "value", "output")
    weights = oracle.tensors({n: np.asarray(getattr(attention, n)[...]) for n in names})
    tx = oracle.tensors(x)
    want = torch.stack([
        oracle.attention(tx[b], weights, POSITIONS[b].tolist(), SEGMENTS[b].tolist(), THETA, window) for b in range(2)
    ])  # fmt: skip
    want.backward(torch.tensor(g, dtype=torch.float64))
    np.testing.assert_allclose(y, want.detach(), atol=2e-6)
    np.testing.assert_allclose(dx, tx.grad, atol=1e-5)
    for name, grad in oracle.grads(weights).items():
        assert np.linalg.norm(getattr(got, name)[...] - grad) <= 2e-6 * np.linalg.norm(grad), name


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_window_counts_the_query_itself(backend):
    """B4: with window w, the value of key s reaches exactly the queries s ... s + w - 1."""
    attention = module(2, 1, 4)
    x = jnp.asarray(np.random.default_rng(1).normal(0, 1, (2, 7, 12)), jnp.float32)
    reached = jax.jit(jax.jacobian(lambda x: jnp.sum(run_module(attention, x, 4, 3, backend), -1)[0]))(x)[:, 0]
    np.testing.assert_array_equal(
        np.abs(reached).max(-1) > 1e-6, np.tril(np.ones((7, 7))) - np.tril(np.ones((7, 7)), -3) > 0
    )
