"""Grouped matmul: rows sorted by group, each group times its own matrix. One function, one VJP, several back-ends.

    y[r] = x[r] @ w[g]   for the rows r of group g;   dx[r] = dy[r] @ w[g]^T;   dw[g] = sum over its rows x[r]^T dy[r]

Rows behind the last group are undefined in every back-end and must be selected away by the caller, never multiplied.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.choice import choose_matmul
from mixtral_jax.kernels.products import bits, from_bits, narrowed, transposed, turned_right
from mixtral_jax.parallel import machine, same_variance, zeros

BLOCK_ROWS = 128


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D *F"], group_sizes_E: Int[Array, " E"], *, backend: str = "auto"
) -> Float[Array, "R F"]:
    """x[r] @ w[group of r] for rows sorted by group; rows behind sum(group_sizes) are undefined.

    Accumulated in fp32, returned in x's dtype. Trailing dimensions of `w` behind the second count as one. Source:
    MegaBlocks (2211.15841).
    """
    kernel = choose_matmul(backend, machine()).kernel
    return _grouped_matmul(kernel, *same_variance(x_RD, w_EDF, group_sizes_E))


def _forward(backend: str, x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose: bool) -> jax.Array:
    """x @ w per group, or x @ w^T."""
    if backend == "blocked":
        return _blocked_rows(x_RD, w_EDF, sizes_E, transpose=transpose)
    if backend == "dense":
        return _dense_rows(x_RD, w_EDF, sizes_E, transpose)
    if backend == "ragged_dot":
        w = jnp.swapaxes(w_EDF, 1, 2) if transpose else w_EDF
        return jax.lax.ragged_dot(x_RD, w, sizes_E).astype(x_RD.dtype)
    from mixtral_jax.kernels import grouped_accelerator as accelerator

    return accelerator.grouped_rows(backend, x_RD, w_EDF, sizes_E, transpose)


def _weight_gradient(
    backend: str, x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """sum over the rows of each group of x^T dy, (E, D, F)."""
    if backend == "blocked":
        return _blocked_weight_gradient(x_RD, dy_RF, sizes_E).astype(dtype)
    if backend in ("dense", "ragged_dot"):
        member_RE = _membership(x_RD.shape[0], sizes_E)
        inside_R1 = jnp.any(member_RE, axis=1, keepdims=True)
        x_RD, dy_RF = jnp.where(inside_R1, x_RD, 0), jnp.where(inside_R1, dy_RF, 0)
        return jnp.einsum("RE,RD,RF->EDF", member_RE.astype(x_RD.dtype), x_RD, dy_RF).astype(dtype)
    from mixtral_jax.kernels import grouped_accelerator as accelerator

    return accelerator.grouped_weight_gradient(backend, x_RD, dy_RF, sizes_E, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(backend: str, x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _forward(backend, x_RD, _flat(w_EDF), sizes_E, transpose=False)


def _flat(w_EDF: jax.Array) -> jax.Array:
    return w_EDF.reshape(*w_EDF.shape[:2], -1)


def _vjp_backward(backend, saved, dy_RF):
    x_RD, w_EDF, sizes_E = saved
    dx_RD = _forward(backend, dy_RF, _flat(w_EDF), sizes_E, transpose=True)
    inside_R = jnp.arange(x_RD.shape[0]) < jnp.sum(sizes_E)
    dx_RD = jnp.where(inside_R[:, None], dx_RD, 0)
    dw_EDF = _weight_gradient(backend, x_RD, dy_RF, sizes_E, w_EDF.dtype).reshape(w_EDF.shape)
    return dx_RD, dw_EDF, None


# `w` is kept in the shape in which it came: a scan over layers then saves no copy of it
_grouped_matmul.defvjp(lambda backend, *args: (_grouped_matmul(backend, *args), args), _vjp_backward)


def _membership(rows: int, sizes_E: jax.Array) -> jax.Array:
    """(R, E): whether row r belongs to group e."""
    ends_E = jnp.cumsum(sizes_E)
    row_R1 = jnp.arange(rows)[:, None]
    return (row_R1 >= (ends_E - sizes_E)[None, :]) & (row_R1 < ends_E[None, :])


def _dense_rows(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose: bool) -> jax.Array:
    """The oracle: every row times every matrix, then the right one selected."""
    y_REF = jnp.einsum("RF,EDF->RED" if transpose else "RD,EDF->REF", x_RD, w_EDF)
    member_RE = _membership(x_RD.shape[0], sizes_E)
    return jnp.sum(jnp.where(member_RE[..., None], y_REF, 0), axis=1)


def _blocked_rows(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"], *, transpose: bool
) -> Float[Array, "R F"]:
    """One block of rows after another, and of groups: a block that reaches past its group's end writes into the next
    group's rows, which that group then overwrites, so that no mask and no padding between groups is needed. Only the
    rows that exist are computed, rounded up to a block per group; those behind the last group hold garbage.
    """
    rows, block = x_RD.shape[0], min(BLOCK_ROWS, x_RD.shape[0])
    x_RD = jnp.pad(x_RD, ((0, block), (0, 0)))
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def group(y_RF, inputs):
        w_DF, start, size = inputs
        w_DF = turned_right(size > 0, w_DF) if transpose else w_DF

        def one_block(i, y_RF):
            row = start + i * block
            x_bD = jax.lax.dynamic_slice_in_dim(x_RD, row, block)
            y_bF = narrowed(jnp.dot(x_bD, w_DF, preferred_element_type=jnp.float32), x_RD.dtype)
            return jax.lax.dynamic_update_slice_in_dim(y_RF, bits(y_bF), row, axis=0)

        return jax.lax.fori_loop(0, (size + block - 1) // block, one_block, y_RF), None

    y_RF = bits(zeros((rows + block, w_EDF.shape[1 if transpose else 2]), x_RD.dtype, x_RD))
    y_RF, _ = jax.lax.scan(group, y_RF, (w_EDF, starts_E, sizes_E))
    return from_bits(y_RF[:rows], x_RD.dtype)


def _blocked_weight_gradient(
    x_RD: Float[Array, "R D"], dy_RF: Float[Array, "R F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """The same of the gradient, fp32; rows past a group's end count as zeros."""
    block = min(BLOCK_ROWS, x_RD.shape[0])
    x_RD, dy_RF = (jnp.pad(a, ((0, block), (0, 0))) for a in same_variance(x_RD, dy_RF))
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def group(_, inputs):
        start, size = inputs

        def one_block(i, dw_DF):
            row = start + i * block
            inside_b1 = (i * block + jnp.arange(block) < size)[:, None]
            x_bD = jnp.where(inside_b1, jax.lax.dynamic_slice_in_dim(x_RD, row, block), 0)
            dy_bF = jnp.where(inside_b1, jax.lax.dynamic_slice_in_dim(dy_RF, row, block), 0)
            return dw_DF + jnp.dot(transposed(x_bD), dy_bF, preferred_element_type=jnp.float32)

        none_DF = zeros((x_RD.shape[1], dy_RF.shape[1]), jnp.float32, x_RD)
        return None, jax.lax.fori_loop(0, (size + block - 1) // block, one_block, none_DF)

    return jax.lax.scan(group, None, (starts_E, sizes_E))[1]
