"""RMS norm and embedding against the definition (NUMERICS B1)."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.layers import Embedding, Head, RMSNorm, rms_norm
from tests.optional import torch
from tests.oracles import mixtral as oracle


def test_rms_norm_value_and_gradients():
    rng = np.random.default_rng(0)
    x, scale, g = rng.normal(0, 3, (4, 5, 16)), rng.normal(1, 0.3, 16), rng.normal(0, 1, (4, 5, 16))
    y, pull = jax.vjp(lambda x, s: rms_norm(x, s, 1e-5), *(jnp.asarray(a, jnp.float32) for a in (x, scale)))
    tx, ts = oracle.tensors({"x": x, "s": scale}).values()
    want = oracle.rms_norm(tx, ts, 1e-5)
    want.backward(torch.tensor(g))
    np.testing.assert_allclose(y, want.detach(), rtol=1e-6, atol=1e-6)
    for got, t in zip(pull(jnp.asarray(g, jnp.float32)), (tx, ts), strict=True):
        np.testing.assert_allclose(got, t.grad, rtol=2e-6, atol=2e-6)


def test_rms_norm_in_bfloat16_keeps_statistics_in_fp32_and_casts_before_the_scale():
    """B1, in this order: fp32 statistics, cast to bf16, times the weight in bf16. Another order rounds differently."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(0, 1, (64, 256)), jnp.bfloat16)
    scale = jnp.asarray(rng.normal(1, 0.5, 256), jnp.float32)
    x32 = np.asarray(x, np.float32)
    unit = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + np.float32(1e-5))
    want = jnp.asarray(unit).astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)[None]
    scaled_first = jnp.asarray(unit * np.asarray(scale.astype(jnp.bfloat16), np.float32)).astype(jnp.bfloat16)
    got = rms_norm(x, scale, 1e-5)
    assert got.dtype == jnp.bfloat16
    assert np.mean(np.asarray(got != want)) < 1e-3  # rsqrt against 1 / sqrt may round one value the other way
    assert np.mean(np.asarray(got != scaled_first)) > 0.05


def test_rms_norm_does_not_overflow_where_fp32_does_not():
    x = jnp.asarray([[200.0, -200.0, 300.0, 0.0]], jnp.float16)  # squares overflow fp16
    assert np.isfinite(np.asarray(rms_norm(x, jnp.ones(4), 1e-5), np.float32)).all()


def test_epsilon_is_used():
    x = jnp.full((1, 8), 1e-3)
    norm = RMSNorm(8, 1e-2, dtype=jnp.float32)
    np.testing.assert_allclose(norm(x), x / np.sqrt(1e-6 + 1e-2), rtol=1e-6)


def test_embedding_looks_up_rows_and_adds_up_their_gradients():
    embed = Embedding(7, 4, 0.02, key=jax.random.key(0), dtype=jnp.float32, held=jnp.float32)
    tokens = jnp.asarray([[0, 6, 3], [3, 3, 1]])
    table = np.asarray(embed.weight[...])
    np.testing.assert_array_equal(embed(tokens, jnp.float32), table[np.asarray(tokens)])
    grad = jax.grad(lambda m: jnp.sum(m(tokens, jnp.float32)))(embed)
    np.testing.assert_array_equal(grad.weight[...], np.array([1, 1, 0, 3, 0, 0, 1])[:, None] * np.ones((7, 4)))
    assert embed(tokens, jnp.bfloat16).dtype == jnp.bfloat16


def test_weights_are_drawn_with_the_std_that_was_asked_for():
    embed = Embedding(500, 40, 0.03, key=jax.random.key(1), dtype=jnp.float32, held=jnp.float32)
    head = Head(40, 500, 0.05, key=jax.random.key(1), dtype=jnp.float32, held=jnp.float32)
    assert abs(float(jnp.std(embed.weight[...])) - 0.03) < 0.001
    assert abs(float(jnp.std(head.weight[...])) - 0.05) < 0.002
