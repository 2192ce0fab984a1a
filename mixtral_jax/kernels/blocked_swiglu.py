"""The experts' whole feed-forward in blocks of rows, in plain XLA: what the back-end `blocked` does without adapters.

Both products of a block and the activation between them run while its rows lie in the cache, forward and backward;
h = x w13 alone is kept for the backward pass. Blocks overlap as in kernels/blocked.py.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.blocked import zeros_like_rows
from mixtral_jax.sharding import alike

BLOCKS = (512, 128, 64)  # rows; each divides the one before
SAVED = "expert_hidden"  # name of what the backward pass needs besides the inputs


def blocked_swiglu(
    x_RD: Float[Array, "R D"],
    w13_ED2F: Float[Array, "E D *twoF"],
    w2_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, " E"],
) -> Float[Array, "R D"]:
    """w2( silu(w1 x) * w3 x ) with the matrices of each row's group; rows behind the last group are undefined.

    Source: GLU variants (2002.05202), equation 6; products accumulate in fp32, h and the activation have x's dtype.
    """
    return _ffn(*alike(x_RD, w13_ED2F, w2_EFD, group_sizes_E))


def _over_blocks(rows: int, start: jax.Array, size: jax.Array, body: Any, carry: Any) -> Any:
    """body(block, row, carry) over start ... start + size of `rows`; the last, smallest block may reach past them."""
    units = (size + BLOCKS[-1] - 1) // BLOCKS[-1]
    for block in (block for block in BLOCKS if block <= rows):
        count, units = units // (block // BLOCKS[-1]), units % (block // BLOCKS[-1])
        carry = jax.lax.fori_loop(
            0, count, lambda i, carry, block=block, start=start: body(block, start + i * block, carry), carry
        )
        start += count * block
    return carry


_slice = partial(jax.lax.dynamic_slice_in_dim, axis=0)
_put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)


def _inside(x_RD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The rows of nobody, which may hold anything, as zeros, and room for the last block behind them."""
    inside_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(sizes_E))[:, None]
    return jnp.pad(jnp.where(inside_R1, x_RD, 0), ((0, BLOCKS[-1]), (0, 0)))


def _product(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(dtype)


def _transposed(a: jax.Array) -> jax.Array:
    # made before its product: XLA's CPU matmul is a third slower on a transposed left side
    return jax.lax.optimization_barrier(a.T)


def _activation(h_b2F: jax.Array) -> jax.Array:
    h1_bF, h3_bF = jnp.split(h_b2F.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(h1_bF) * h3_bF).astype(h_b2F.dtype)


def _activation_gradient(h_b2F: jax.Array, da_bF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The activation again, and dh from da: silu' = s + silu (1 - s), s the sigmoid."""
    h1_bF, h3_bF = jnp.split(h_b2F.astype(jnp.float32), 2, axis=-1)
    s_bF = jax.nn.sigmoid(h1_bF)
    silu_bF, da_bF = h1_bF * s_bF, da_bF.astype(jnp.float32)
    dh1_bF = da_bF * h3_bF * (s_bF + silu_bF * (1 - s_bF))
    dh_b2F = jnp.concatenate([dh1_bF, da_bF * silu_bF], axis=-1)
    return (silu_bF * h3_bF).astype(h_b2F.dtype), dh_b2F.astype(h_b2F.dtype)


@jax.custom_vjp
def _ffn(x_RD: jax.Array, w13_ED2F: jax.Array, w2_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _forward(x_RD, w13_ED2F, w2_EFD, sizes_E)[0]


def _forward(x_RD, w13_ED2F, w2_EFD, sizes_E):
    """y, and h with some rows of no meaning behind the last."""
    rows, dtype = x_RD.shape[0], x_RD.dtype
    x_RD = _inside(x_RD, sizes_E)

    def group(buffers, inputs):
        w13_D2F, w2_FD, start, size = inputs
        w13_D2F = w13_D2F.reshape(w13_D2F.shape[0], -1)

        def one_block(block, row, buffers):
            y_RD, h_R2F = buffers
            h_b2F = _product(_slice(x_RD, row, block), w13_D2F, dtype)
            y_bD = _product(_activation(h_b2F), w2_FD, dtype)
            # where a block reaches past its group's end, the next group overwrites these rows
            return _put(y_RD, y_bD, row), _put(h_R2F, h_b2F, row)

        return _over_blocks(x_RD.shape[0], start, size, one_block, buffers), None

    buffers = zeros_like_rows(x_RD.shape, x_RD), zeros_like_rows((x_RD.shape[0], 2 * w2_EFD.shape[1]), x_RD)
    (y_RD, h_R2F), _ = jax.lax.scan(group, buffers, (w13_ED2F, w2_EFD, jnp.cumsum(sizes_E) - sizes_E, sizes_E))
    return y_RD[:rows], h_R2F


def _vjp_forward(x_RD, w13_ED2F, w2_EFD, sizes_E):
    y_RD, h_R2F = _forward(x_RD, w13_ED2F, w2_EFD, sizes_E)
    return y_RD, (x_RD, w13_ED2F, w2_EFD, sizes_E, checkpoint_name(h_R2F, SAVED))


def _vjp_backward(saved, dy_RD):
    x_RD, w13_ED2F, w2_EFD, sizes_E, h_R2F = saved
    rows, dtype = x_RD.shape[0], x_RD.dtype
    x_RD, dy_RD = _inside(x_RD, sizes_E), _inside(dy_RD, sizes_E)

    def group(dx_RD, inputs):
        w13_D2F, w2_FD, start, size = inputs
        w13_D2F = w13_D2F.reshape(w13_D2F.shape[0], -1)

        def one_block(block, row, carry):
            dx_RD, dw13_D2F, dw2_DF = carry
            # the rows past the group's end count as zeros in dw, and their dx is overwritten by the next group
            mine_b1 = (row + jnp.arange(block) < start + size)[:, None]
            x_bD, dy_bD = _slice(x_RD, row, block), jnp.where(mine_b1, _slice(dy_RD, row, block), 0)
            a_bF, dh_b2F = _activation_gradient(_slice(h_R2F, row, block), _product(dy_bD, w2_FD.T, dtype))
            dx_RD = _put(dx_RD, _product(dh_b2F, w13_D2F.T, dtype), row)
            dw13_D2F += _product(_transposed(x_bD), dh_b2F, jnp.float32)
            dw2_DF += _product(_transposed(dy_bD), a_bF, jnp.float32)
            return dx_RD, dw13_D2F, dw2_DF

        like = x_RD.astype(jnp.float32)
        carry = (dx_RD, zeros_like_rows(w13_D2F.shape, like), zeros_like_rows(w2_FD.shape[::-1], like))
        dx_RD, dw13_D2F, dw2_DF = _over_blocks(x_RD.shape[0], start, size, one_block, carry)
        return dx_RD, (dw13_D2F.astype(w13_ED2F.dtype), dw2_DF.T.astype(w2_EFD.dtype))

    inputs = (w13_ED2F, w2_EFD, jnp.cumsum(sizes_E) - sizes_E, sizes_E)
    dx_RD, (dw13_ED2F, dw2_EFD) = jax.lax.scan(group, zeros_like_rows(x_RD.shape, x_RD), inputs)
    inside_R1 = (jnp.arange(rows) < jnp.sum(sizes_E))[:, None]
    return jnp.where(inside_R1, dx_RD[:rows], 0), dw13_ED2F.reshape(w13_ED2F.shape), dw2_EFD, None


_ffn.defvjp(_vjp_forward, _vjp_backward)
