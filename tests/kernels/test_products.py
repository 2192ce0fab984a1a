"""Products in bf16 on a CPU: the values and gradients of the plain ones, and programs that compute them in bf16."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import blocked_swiglu, linear, native_bf16
from mixtral_jax.losses import linear_cross_entropy

bf16, fp32 = jnp.bfloat16, jnp.float32


def arrays(*shapes, dtype=bf16):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def wide_products(run, *args):
    """The products with an fp32 operand, and the buffers that are widened to be written in parts."""
    text = jax.jit(run).lower(*args).compile().as_text()
    kinds = dict(re.findall(r"(%\S+) = (\w+)\[", text))
    pairs = re.findall(r" dot\((?:\S+ )?(%[^\s,]+), (?:\S+ )?(%[^\s,)]+)\)", text)
    wide = [pair for pair in pairs if "f32" in map(kinds.get, pair)]
    assert pairs
    return wide + re.findall(r"f32\S+ dynamic-update-slice\(%convert", text)


@pytest.mark.parametrize("inner", [1, 2])
def test_a_projection_and_its_gradients(inner):
    x, w, g = arrays((2, 8, *(4, 6)[2 - inner :]), (*(4, 6)[2 - inner :], 3, 5), (2, 8, 3, 5))

    def twin(x, w):
        return jnp.tensordot(x.astype(fp32), w.astype(fp32), inner)

    y, back = jax.vjp(linear, x, w)
    wanted, wanted_back = jax.vjp(twin, x, w)
    for got, exact in zip((y, *back(g)), (wanted, *wanted_back(g.astype(fp32))), strict=True):
        assert got.dtype == bf16
        np.testing.assert_allclose(got.astype(fp32), exact.astype(bf16).astype(fp32), rtol=2**-8)


def test_in_fp32_it_is_the_plain_product():
    x, w = arrays((2, 8, 6), (6, 3), dtype=fp32)
    assert (linear(x, w) == jnp.tensordot(x, w, 1)).all()


@pytest.mark.skipif(not native_bf16(), reason="this processor has no products of bf16")
def test_no_product_of_a_layer_or_of_the_head_is_computed_in_fp32():
    x, w = arrays((2, 64, 256), (256, 4, 64))
    assert not wide_products(jax.value_and_grad(lambda w, x: linear(x, w).astype(fp32).sum(), (0, 1)), w, x)

    rows, w13, w2 = arrays((512, 256), (2, 256, 256), (2, 128, 256))
    sizes, gate = jnp.array([300, 212], jnp.int32), jnp.ones(512)

    def experts(rows, w13, w2):
        return blocked_swiglu(rows, gate, w13, w2, sizes).astype(fp32).sum()

    assert not wide_products(jax.grad(experts, (0, 1, 2)), rows, w13, w2)

    targets, weights = jnp.zeros(512, jnp.int32), jnp.ones(512)
    for stored in ((256, 1024), (1024, 256)):  # tied embeddings come transposed

        def head(rows, w):
            w = w if w.shape[0] == 256 else w.T
            return linear_cross_entropy(rows, w, targets, weights, chunk=256).loss_sum

        assert not wide_products(jax.grad(head, (0, 1)), rows, *arrays(stored))
