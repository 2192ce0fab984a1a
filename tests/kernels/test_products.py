"""Products in bf16 on a CPU: the values and gradients of the plain ones, and programs that compute them in bf16."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import Low, blocked_swiglu, grouped_matmul, linear, narrowed, native_bf16, saved
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


def test_to_bf16_by_integers_is_to_bf16():
    patterns = np.arange(2**16, dtype=np.uint32)[:, None] << 16  # each bf16; around the half way to the next
    x = (patterns | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).view(np.float32)
    got = jax.jit(lambda x: narrowed(x, bf16))(x)
    with np.errstate(invalid="ignore"):  # of a NaN
        wanted = x.astype(bf16)
    assert got.dtype == bf16 and (jnp.isnan(got) == np.isnan(x)).all()
    same = jax.lax.bitcast_convert_type(got, jnp.uint16) == jax.lax.bitcast_convert_type(wanted, jnp.uint16)
    assert (same | jnp.isnan(got)).all()
    assert jax.grad(lambda x: narrowed(3 * x, bf16).astype(fp32))(1.0) == 3


@pytest.mark.parametrize("dtype", [bf16, fp32])
def test_what_is_saved_in_a_stack_of_layers_is_written_once(dtype):
    def run(x, w_LII, name=saved):
        def layer(x, w):
            return jnp.sin(name(x @ w, "kept")) @ w, None

        policy = jax.checkpoint_policies.save_only_these_names("kept")
        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, w_LII)[0].astype(fp32).sum()

    x, w_LII = arrays((64, 32), (4, 32, 32), dtype=dtype)
    gradient = jax.jit(jax.grad(run, (0, 1)))
    wanted = jax.grad(lambda x, w_LII: run(x, w_LII, lambda x, name: x), (0, 1))(x, w_LII)
    for got, plain in zip(gradient(x, w_LII), wanted, strict=True):
        np.testing.assert_allclose(got.astype(fp32), plain.astype(fp32), atol=1e-6 if dtype == fp32 else 2**-4)
    # two products forward and four back: the first is not computed again
    jaxpr = str(jax.make_jaxpr(jax.grad(run, (0, 1)))(x, w_LII))
    assert jaxpr.count("dot_general[") == 6 and ("u16[4,64,32]" in jaxpr) == (dtype == bf16)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("sizes", [(60, 36), (0, 96)])
def test_gradients_of_matrices_held_in_fp32_are_not_rounded(sizes, adapted):
    x, dy, a13, b13, a2, b2 = arrays((96, 16), (96, 16), (2, 16, 4), (2, 4, 16), (2, 8, 4), (2, 4, 16))
    w13, w2 = arrays((2, 16, 2, 8), (2, 8, 16), dtype=fp32)
    low = (Low(a13, b13), Low(a2, b2)) if adapted else ()

    @jax.jit
    def run(x, w13, w2):
        y, back = jax.vjp(lambda x, *w: blocked_swiglu(x, jnp.ones(96), *w, jnp.array(sizes), *low), x, w13, w2)
        return y, *back(dy)

    y, dx, *dw = run(x, w13, w2)
    narrow_y, narrow_dx, *narrow_dw = run(x, w13.astype(bf16), w2.astype(bf16))
    assert (y == narrow_y).all() and (dx == narrow_dx).all()
    for wide, narrow in zip(dw, narrow_dw, strict=True):
        assert (wide.dtype, narrow.dtype) == (fp32, bf16)
        assert (wide.astype(bf16) == narrow).all() and (wide != narrow.astype(fp32)).any()
        assert sizes[0] or not wide[0].any()


@pytest.mark.skipif(not native_bf16(), reason="this processor has no products of bf16")
def test_no_product_of_a_layer_or_of_the_head_is_computed_in_fp32():
    x, w = arrays((2, 64, 256), (256, 4, 64))
    assert not wide_products(jax.value_and_grad(lambda w, x: linear(x, w).astype(fp32).sum(), (0, 1)), w, x)

    rows, w13, w2 = arrays((512, 256), (2, 256, 256), (2, 128, 256))
    sizes, gate = jnp.array([300, 212], jnp.int32), jnp.ones(512)

    def experts(rows, w13, w2):
        return blocked_swiglu(rows, gate, w13, w2, sizes).astype(fp32).sum()

    assert not wide_products(jax.grad(experts, (0, 1, 2)), rows, w13, w2)

    def grouped(rows, w):  # what adapters with dropout take
        return grouped_matmul(rows, w, sizes, backend="blocked").astype(fp32).sum()

    assert not wide_products(jax.grad(grouped, (0, 1)), rows, w13)

    targets, weights = jnp.zeros(512, jnp.int32), jnp.ones(512)
    for stored in ((256, 1024), (1024, 256)):  # tied embeddings come transposed

        def head(rows, w):
            w = w if w.shape[0] == 256 else w.T
            return linear_cross_entropy(rows, w, targets, weights, chunk=256).loss_sum

        assert not wide_products(jax.grad(head, (0, 1)), rows, *arrays(stored))
