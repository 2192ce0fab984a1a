"""The expert block against a loop over tokens and experts: dropless, capacity, chunks, odd loads (NUMERICS B6, G2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import MixtralConfig, MoeConfig
from mixtral_jax.kernels import grouped as kernel
from mixtral_jax.lora import LoraConfig
from mixtral_jax.moe.block import SparseMoe
from tests.optional import torch
from tests.oracles import mixtral as oracle

B, T, D, F, E, K = 2, 12, 8, 10, 5, 2
CONFIG = MixtralConfig(
    vocab_size=8, hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=E, num_experts_per_tok=K, initializer_range=0.5,
)  # fmt: skip
LOADS = ("mixed", "padding", "two_experts_take_all", "all_padding")


def numbers(load):
    """(weights, x, valid, incoming gradient): the shapes never change, so one compiled function serves all."""
    rng = np.random.default_rng(0)
    shapes = {"router": (D, E), "w13": (E, D, 2, F), "w2": (E, F, D)}
    weights = {n: rng.normal(0, 0.5, s).astype(np.float32) for n, s in shapes.items()}
    x, g = rng.normal(0, 1, (2, B, T, D)).astype(np.float32)
    valid = np.ones((B, T), bool)
    if load == "padding":
        valid = rng.random((B, T)) < 0.6
    if load == "all_padding":
        valid[:] = False
    if load == "two_experts_take_all":
        x[..., 0] = 2
        weights["router"][0] = [0, 0, 6, 5, 0]
    return weights, x, valid, g


@functools.cache
def compiled(options):
    """Output, statistics, and gradients of sum(y * g) + balance- and z-like sums of the statistics."""
    module = nnx.eval_shape(lambda: SparseMoe(CONFIG, options, key=jax.random.key(0), dtype=jnp.float32))
    graphdef, _ = nnx.split(module)

    def run(weights, x, valid, g):
        def loss(weights, x):
            y, stats, _ = nnx.merge(graphdef, weights)(x, valid)
            return jnp.sum(y * g) + 0.3 * jnp.sum(jnp.sin(stats.probs_LE)) + 0.1 * stats.z_L, (y, stats)

        (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
        return aux, grads

    return jax.jit(run)


def expected(weights, x, valid, g, capacity=None, order="probability"):
    weights, x = oracle.tensors(weights), oracle.tensors(x)
    y, stats = oracle.moe(x.reshape(-1, D), weights, K, valid.reshape(-1), capacity, order)
    y = y.reshape(x.shape)
    loss = (y * torch.tensor(g)).sum() + 0.3 * torch.sin(stats["probs"]).sum() + 0.1 * stats["z"]
    if valid.any():
        loss.backward()
    return y.detach().numpy(), stats, oracle.grads(weights), oracle.grads(x)


def check(got, want):
    (y, stats), (grads, dx) = got
    want_y, want_stats, want_grads, want_dx = want
    np.testing.assert_allclose(y, want_y, atol=1e-5)
    np.testing.assert_array_equal(stats.counts_LE, want_stats["counts"])
    np.testing.assert_allclose(stats.probs_LE, want_stats["probs"].detach(), atol=1e-5)
    assert float(stats.dropped_L) == want_stats["dropped"]
    assert float(stats.dropped_first_L) == want_stats["dropped_first"]
    np.testing.assert_allclose(dx, want_dx, atol=3e-5)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("backend", ["blocked", "ragged_dot", "dense"])
@pytest.mark.parametrize("load", LOADS)
def test_dropless(backend, load):
    given = numbers(load)
    got = compiled(MoeConfig(matmul=backend))(*given)
    check(got, expected(*given))
    (y, stats), _ = got
    assert not np.asarray(y)[~given[2]].any() and float(stats.tokens_L) == given[2].sum()
    if load == "two_experts_take_all":
        np.testing.assert_array_equal(stats.counts_LE, [0, 0, B * T, B * T, 0])


@pytest.mark.parametrize(
    ("factor", "order"),
    [(0.5, "probability"), (0.5, "choice"), (0.5, "token"), (1.0, "probability"), (1.25, "choice"), (4.0, "token")],
)
@pytest.mark.parametrize("load", LOADS)
def test_capacity_drops_what_the_definition_drops(factor, order, load):
    """At most ceil(factor * tokens * k / E) choices an expert, in the order asked for; every drop is counted."""
    given = numbers(load)
    capacity = int(np.ceil(factor * B * T * K / E))
    want = expected(*given, capacity, order)
    check(compiled(MoeConfig(matmul="blocked", capacity_factor=factor, capacity_order=order))(*given), want)
    if load == "two_experts_take_all":
        assert want[1]["dropped"] == max(0, 2 * (B * T - capacity))
    if load == "all_padding":
        assert want[1]["dropped"] == 0


@pytest.mark.parametrize("load", LOADS)
def test_capacity_so_high_that_nothing_drops_is_dropless(load):
    given = numbers(load)
    got = compiled(MoeConfig(matmul="blocked", capacity_factor=float(E)))(*given)
    check(got, expected(*given))
    assert float(got[0][1].dropped_L) == 0


@pytest.mark.parametrize(("chunk", "options"), [(8, {}), (8, dict(capacity_factor=0.5)), (7, {}), (23, {})])
@pytest.mark.parametrize("load", LOADS)
def test_chunks_of_tokens_change_nothing(chunk, options, load):
    """Of 24 tokens; the last chunk may be filled up."""
    given = numbers(load)
    whole = compiled(MoeConfig(matmul="blocked", **options))(*given)
    parts = compiled(MoeConfig(matmul="blocked", chunk_tokens=chunk, **options))(*given)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_each_chunk_drops_otherwise():
    """Adapter dropout on the same 8 tokens three times, a chunk each."""
    lora = LoraConfig(rank=4, dropout=0.5, targets=("moe.w*",))
    make = lambda chunk: SparseMoe(  # noqa: E731 - short
        CONFIG, MoeConfig(chunk_tokens=chunk), key=jax.random.key(0), dtype=jnp.float32, lora=lora
    )
    x = jnp.tile(jax.random.normal(jax.random.key(2), (1, 8, D)), (1, 3, 1))
    outs = {}
    for chunk in (8, 12, None):
        moe = make(chunk)
        for name in ("w1", "w3", "w2"):
            b = getattr(moe, f"{name}_lora").b
            b[...] = jax.random.normal(jax.random.key(1), b.shape)
        y = moe(x, jnp.ones((1, 24), bool), jax.random.key(3)).y_BTD.reshape(3, 8, D)
        assert all(np.abs(y[0] - y[i]).max() > 0.01 for i in (1, 2))
        outs[chunk] = moe(x, jnp.ones((1, 24), bool), None).y_BTD
    np.testing.assert_allclose(outs[8], outs[None], atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(chunk_tokens=6), dict(capacity_factor=0.5)])
def test_nan_behind_the_groups_never_leaks(options, monkeypatch):
    forward = kernel._forward

    def careless(backend, x, w, sizes, *args, **kwargs):
        y = forward(backend, x, w, sizes, *args, **kwargs)
        return jnp.where((jnp.arange(y.shape[0]) < jnp.sum(sizes))[:, None], y, jnp.nan)

    monkeypatch.setattr(kernel, "_forward", careless)
    capacity = int(np.ceil(0.5 * B * T * K / E)) if "capacity_factor" in options else None
    run = compiled.__wrapped__(MoeConfig(matmul="blocked", **options))
    for load in ("padding", "all_padding"):
        given = numbers(load)
        check(run(*given), expected(*given, capacity))


def test_bfloat16_block():
    """Activations in bf16; routing, combine and statistics in fp32."""
    weights, x, valid, g = numbers("padding")
    (y, stats), (grads, _) = compiled(MoeConfig(matmul="blocked"))(weights, jnp.asarray(x, jnp.bfloat16), valid, g)
    want_y, want_stats, *_ = expected(weights, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), valid, g)
    assert y.dtype == jnp.bfloat16 and stats.probs_LE.dtype == jnp.float32 and grads["w13"].dtype == jnp.float32
    np.testing.assert_array_equal(stats.counts_LE, want_stats["counts"])  # the router saw fp32 weights
    assert np.linalg.norm(np.asarray(y, np.float32) - want_y) < 2e-2 * np.linalg.norm(want_y)
