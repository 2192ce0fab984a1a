"""SwiGLU and the product behind it as one function, whose backward pass writes over what it reads.

Left to autodiff the gradient of SwiGLU holds h, its gradient in two halves, their concatenation and the activation at
once: at 8 sequences a chip 3.8 GB more than the loop below, in which the gradient takes the place of h and the
activation that of its own gradient.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.grouped_matmul import grouped_matmul
from mixtral_jax.parallel.sharding import alike

CHUNK = 1024  # rows that are read before any is written over


def grouped_down(
    h_R2F: Float[Array, "R twoF"], w_EFD: Float[Array, "E F D"], group_sizes_E: Int[Array, " E"], *, backend: str
) -> Float[Array, "R D"]:
    """(silu(h1) * h3) @ w[group of r] for h = [h1, h3]; rows behind the last group are undefined."""
    return _grouped_down(backend, *alike(h_R2F, w_EFD, group_sizes_E))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_down(backend: str, h_R2F: jax.Array, w_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    h1_RF, h3_RF = _halves(h_R2F, 0, jnp.sum(sizes_E))
    a_RF = (jax.nn.silu(h1_RF) * h3_RF).astype(h_R2F.dtype)
    # typed as varying like the rows: else the transpose would sum over devices
    anywhere_RD, a_RF = alike(jnp.zeros((a_RF.shape[0], w_EFD.shape[2]), a_RF.dtype), a_RF)
    return jax.vjp(_up(backend, w_EFD, sizes_E), anywhere_RD)[1](a_RF)[0]


def _up(backend: str, w_EFD: jax.Array, sizes_E: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """g -> g @ w^T, the transpose of the product: a matrix sharded by D is gathered as (E, D, F) without a copy, and
    so all three products (this one, its two gradients) read or write it.
    """
    return lambda g_RD: grouped_matmul(g_RD, jnp.swapaxes(w_EFD, 1, 2), sizes_E, backend=backend)


def _vjp_forward(backend, h_R2F, w_EFD, sizes_E):
    y_RD = _grouped_down(backend, h_R2F, w_EFD, sizes_E)
    return y_RD, (h_R2F, w_EFD, sizes_E, y_RD)


def _vjp_backward(backend, saved, dy_RD):
    h_R2F, w_EFD, sizes_E, y_RD = saved
    # Where y is computed again (the gates' gradient needs it) that comes first, before there is a gradient to hold.
    dy_RD, _ = jax.lax.optimization_barrier((dy_RD, y_RD))
    da_RF = _up(backend, w_EFD, sizes_E)(dy_RD)
    dh_R2F, a_RF = swiglu_backward(h_R2F, da_RF, jnp.sum(sizes_E))
    (dw_EFD,) = jax.vjp(lambda w_EFD: _up(backend, w_EFD, sizes_E)(dy_RD), w_EFD)[1](a_RF)
    return dh_R2F, dw_EFD, None


_grouped_down.defvjp(_vjp_forward, _vjp_backward)


def swiglu_backward(
    h_R2F: Float[Array, "R twoF"], da_RF: Float[Array, "R F"], rows: Int[Array, ""]
) -> tuple[Float[Array, "R twoF"], Float[Array, "R F"]]:
    """Gradient of h, and silu(h1) * h3 itself, in the memory of h and da; 0 in rows from `rows` on. Maths in fp32."""
    chunks, rest = divmod(h_R2F.shape[0], CHUNK)

    def one(start: jax.Array | int, size: int, held: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_R2F, da_RF = held
        # read both before either is written
        h_c2F, da_cF = jax.lax.optimization_barrier(
            tuple(jax.lax.dynamic_slice_in_dim(x, start, size) for x in (h_R2F, da_RF))
        )
        h1_cF, h3_cF = _halves(h_c2F, start, rows)
        da_cF = _inside(da_cF, start, rows)
        s_cF = jax.nn.sigmoid(h1_cF)
        silu_cF = h1_cF * s_cF
        dh_c2F = jnp.concatenate([da_cF * h3_cF * (s_cF + silu_cF * (1 - s_cF)), da_cF * silu_cF], axis=1)
        return (
            jax.lax.dynamic_update_slice_in_dim(h_R2F, dh_c2F.astype(h_R2F.dtype), start, 0),
            jax.lax.dynamic_update_slice_in_dim(da_RF, (silu_cF * h3_cF).astype(da_RF.dtype), start, 0),
        )

    held = h_R2F, da_RF
    if chunks:
        held = jax.lax.fori_loop(0, chunks, lambda i, held: one(i * CHUNK, CHUNK, held), held)
    return one(chunks * CHUNK, rest, held) if rest else held


def _inside(x_cF: jax.Array, start: jax.Array | int, rows: jax.Array) -> jax.Array:
    """In fp32. The rows of nobody may hold anything, NaN too: select, never multiply."""
    return jnp.where((start + jnp.arange(x_cF.shape[0]) < rows)[:, None], x_cF, 0).astype(jnp.float32)


def _halves(h_c2F: jax.Array, start: jax.Array | int, rows: jax.Array) -> list[jax.Array]:
    return [_inside(x_cF, start, rows) for x_cF in jnp.split(h_c2F, 2, axis=1)]
