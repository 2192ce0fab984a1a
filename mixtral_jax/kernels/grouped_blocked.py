"""Grouped matmul in blocks of rows, in plain XLA: the CPU back-end, and the fallback everywhere.

Each group's rows are cut into blocks; a block that reaches past its group's end writes into the next group's rows,
which the next group then overwrites: the forward needs no mask and no padding between groups. Only the rows that exist
are computed, rounded up to a block per group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.products import bits, from_bits, narrowed, transposed, turned_right
from mixtral_jax.parallel import same_variance, zeros

BLOCK_ROWS = 128


def blocked_rows(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"], *, transpose: bool
) -> Float[Array, "R F"]:
    """x[r] @ w[g], or x[r] @ w[g]^T; rows behind the last group hold garbage."""
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


def blocked_weight_gradient(
    x_RD: Float[Array, "R D"], dy_RF: Float[Array, "R F"], sizes_E: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """x^T dy over the rows of each group, fp32."""
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
