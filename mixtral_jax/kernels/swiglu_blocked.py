"""The experts' whole feed-forward in blocks of rows, in plain XLA: what the back-end `blocked` does.

Both products of a block and the activation between them run while its rows lie in the cache, forward and backward;
h = x w13 alone is kept for the backward pass. Low-rank factors are part of their product: x W + (x A) B.
Gradients of matrices that nothing differentiates by, such as a frozen base's, are not computed. Blocks overlap as in
kernels/grouped.py.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.activation import swiglu, swiglu_gradient
from mixtral_jax.kernels.products import bits, from_bits, narrowed, transposed, turned_if, turned_right
from mixtral_jax.parallel import same_variance, zeros

BLOCKS = (512, 128, 64)  # rows; each divides the one before
SAVED = "expert_hidden"  # name of what the backward pass needs besides the inputs


class Low(NamedTuple):
    """A pair of low-rank factors for each group, their scale within: y = x W + (x A) B."""

    a: Float[Array, "*E I r"]
    b: Float[Array, "*E r O"]


class Weights(NamedTuple):
    """One group's matrices, or with a leading E all groups'."""

    w13: jax.Array  # (E, D, 2F), or F split in two
    w2: jax.Array  # (E, F, D)
    low13: Low | None
    low2: Low | None


def blocked_swiglu(
    x_RD: Float[Array, "R D"],
    gate_R: Float[Array, " R"],
    w13_ED2F: Float[Array, "E D *twoF"],
    w2_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, " E"],
    low13: Low | None = None,
    low2: Low | None = None,
) -> Float[Array, "R D"]:
    """w2( gate * silu(w1 x) * w3 x ) with the matrices of each row's group; rows behind the last are undefined.

    `low13` (E, D, r), (E, r, 2F) is added to w13, `low2` (E, F, r), (E, r, D) to w2. Source: GLU variants (2002.05202),
    equation 6; LoRA (2106.09685), section 4.1; products accumulate in fp32, h and the activation have x's dtype. w13
    and w2 may have a wider one: they are cast one by one, and their gradients, sums in fp32, are not rounded to x's.
    """
    return _ffn(*same_variance(x_RD, gate_R, Weights(w13_ED2F, w2_EFD, low13, low2), group_sizes_E))


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
_dot = partial(jnp.dot, preferred_element_type=jnp.float32)


def _put(held: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(held, bits(rows), start, axis=0)


def _inside(sizes_E: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The rows of nobody, which may hold anything, as zeros, and room for the last block behind them."""
    inside_R = jnp.arange(arrays[0].shape[0]) < jnp.sum(sizes_E)
    own = [jnp.where(inside_R.reshape(-1, *(1,) * (x.ndim - 1)), x, 0) for x in arrays]
    return [jnp.pad(x, ((0, BLOCKS[-1]), *((0, 0),) * (x.ndim - 1))) for x in own]


def _product(x_bI: jax.Array, w_IO: jax.Array, low: Low | None) -> jax.Array:
    y_bO = _dot(x_bI, w_IO)
    if low is not None:
        y_bO += _dot(_dot(x_bI, low.a).astype(x_bI.dtype), low.b)
    return narrowed(y_bO, x_bI.dtype)


def _low_gradient(x_bI: jax.Array, dy_bO: jax.Array, low: Low) -> Low:
    """x^T (dy B^T) and (x A)^T dy, fp32."""
    g_br, u_br = (_dot(left, right).astype(x_bI.dtype) for left, right in ((dy_bO, low.b.T), (x_bI, low.a)))
    return Low(_dot(transposed(x_bI), g_br), _dot(transposed(u_br), dy_bO))


def _ready(w: Weights, dtype: jnp.dtype) -> Weights:
    """One group's, for products."""
    return w._replace(w13=narrowed(w.w13.reshape(w.w13.shape[0], -1), dtype), w2=narrowed(w.w2, dtype))


def _back(w: Weights, used: jax.Array) -> Weights:
    """The matrices of the transposed products, dy W^T and (dy B^T) A^T."""
    low13, low2 = (None if low is None else Low(low.b.T, low.a.T) for low in (w.low13, w.low2))
    return Weights(turned_right(used, w.w13), turned_right(used, w.w2), low13, low2)


@jax.custom_vjp
def _ffn(x_RD: jax.Array, gate_R: jax.Array, weights: Weights, sizes_E: jax.Array) -> jax.Array:
    return _forward(x_RD, gate_R, weights, sizes_E)[0]


def _forward(x_RD: jax.Array, gate_R: jax.Array, weights: Weights, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y, and the bits of h with some rows of no meaning behind the last."""
    rows = x_RD.shape[0]
    x_RD, gate_R = _inside(sizes_E, x_RD, gate_R)

    def group(buffers, inputs):
        w, start, size = inputs
        w = _ready(w, x_RD.dtype)

        def one_block(block, row, buffers):
            y_RD, h_R2F = buffers
            h_b2F = _product(_slice(x_RD, row, block), w.w13, w.low13)
            y_bD = _product(swiglu(h_b2F, _slice(gate_R, row, block)), w.w2, w.low2)
            # where a block reaches past its group's end, the next group overwrites these rows
            return _put(y_RD, y_bD, row), _put(h_R2F, h_b2F, row)

        return _over_blocks(x_RD.shape[0], start, size, one_block, buffers), None

    h_shape = (x_RD.shape[0], 2 * weights.w2.shape[1])
    buffers = tuple(bits(zeros(shape, x_RD.dtype, x_RD)) for shape in (x_RD.shape, h_shape))
    (y_RD, h_R2F), _ = jax.lax.scan(group, buffers, (weights, jnp.cumsum(sizes_E) - sizes_E, sizes_E))
    return from_bits(y_RD[:rows], x_RD.dtype), h_R2F


def _vjp_forward(x_RD, gate_R, weights, sizes_E):
    # saved values are arrays only, so what is differentiated by is told by structure: () or None
    wanted = Weights._make(() if any(leaf.perturbed for leaf in jax.tree.leaves(field)) else None for field in weights)
    x_RD, gate_R, weights, sizes_E = jax.tree.map(lambda leaf: leaf.value, (x_RD, gate_R, weights, sizes_E))
    y_RD, h_R2F = _forward(x_RD, gate_R, weights, sizes_E)
    return y_RD, (x_RD, gate_R, weights, sizes_E, checkpoint_name(h_R2F, SAVED), wanted)


def _vjp_backward(saved, dy_RD):
    x_RD, gate_R, weights, sizes_E, h_R2F, wanted = saved
    if isinstance(dy_RD, SymbolicZero):
        return None, None, None, None
    rows = x_RD.shape[0]
    x_RD, gate_R, dy_RD = _inside(sizes_E, x_RD, gate_R, dy_RD)

    def group(rows_gradients, inputs):
        held, start, size = inputs
        w = _ready(held, x_RD.dtype)
        back = _back(w, size > 0)

        def one_block(block, row, carry):
            dx_RD, dgate_R, sums = carry
            # the rows past the group's end count as zeros in dw, and their dx is overwritten by the next group
            mine_b1 = (row + jnp.arange(block) < start + size)[:, None]
            x_bD, dy_bD = _slice(x_RD, row, block), jnp.where(mine_b1, _slice(dy_RD, row, block), 0)
            h_b2F = from_bits(_slice(h_R2F, row, block), x_RD.dtype)
            da_bF = _product(dy_bD, back.w2, back.low2)
            dh_b2F, a_bF, dgate_b = swiglu_gradient(h_b2F, da_bF, _slice(gate_R, row, block))
            dx_RD = _put(dx_RD, _product(dh_b2F, back.w13, back.low13), row)
            sums = jax.tree.map(jnp.add, sums, _gradients(w, wanted, x_bD, dh_b2F, a_bF, dy_bD))
            return dx_RD, _put(dgate_R, dgate_b, row), sums

        like = _only(wanted, w._replace(w2=w.w2.T))
        sums = jax.tree.map(lambda leaf: zeros(leaf.shape, jnp.float32, x_RD), like)
        *rows_gradients, sums = _over_blocks(x_RD.shape[0], start, size, one_block, (*rows_gradients, sums))
        sums = sums if sums.w2 is None else sums._replace(w2=turned_if(size > 0, sums.w2))
        sums = jax.tree.map(lambda total, leaf: bits(total.astype(leaf.dtype)), sums, _only(wanted, held))
        return tuple(rows_gradients), sums

    inputs = (weights, jnp.cumsum(sizes_E) - sizes_E, sizes_E)
    none = tuple(bits(zeros(x.shape, x.dtype, x_RD)) for x in (x_RD, gate_R))
    (dx_RD, dgate_R), dw = jax.lax.scan(group, none, inputs)
    dw = jax.tree.map(lambda held, leaf: from_bits(held, leaf.dtype).reshape(leaf.shape), dw, _only(wanted, weights))
    dx_RD, dgate_R = (from_bits(held[:rows], x.dtype) for held, x in ((dx_RD, x_RD), (dgate_R, gate_R)))
    return jnp.where((jnp.arange(rows) < jnp.sum(sizes_E))[:, None], dx_RD, 0), dgate_R, dw, None


def _only(wanted: Any, values: Weights) -> Any:
    return Weights._make(None if want is None else value for want, value in zip(wanted, values, strict=True))


def _gradients(w: Any, wanted: Any, x_bD: jax.Array, dh_b2F: jax.Array, a_bF: jax.Array, dy_bD: jax.Array) -> Weights:
    """Of one block, fp32; that of w2 transposed, for it is dy that is cheap to transpose."""
    gradients = (
        None if wanted.w13 is None else _dot(transposed(x_bD), dh_b2F),
        None if wanted.w2 is None else _dot(transposed(dy_bD), a_bF),
        None if wanted.low13 is None else _low_gradient(x_bD, dh_b2F, w.low13),
        None if wanted.low2 is None else _low_gradient(a_bF, dy_bD, w.low2),
    )
    return Weights._make(gradients)


_ffn.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
