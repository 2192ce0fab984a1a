"""SwiGLU, gate * silu(h1) * h3 for h = [h1, h3] (GLU variants 2002.05202, eq. 6), the gate being the router's weight
of the row's expert: one formula and one derivative, in fp32.

Here for the grouped matmul back-ends, together with the product behind it: left to autodiff the gradient holds h, its
gradient in two halves, their concatenation and the activation at once: at 8 sequences a chip 3.8 GB more than the loop
below, in which the gradient takes the place of h and the activation that of its own gradient. In blocks of rows, with
both products: kernels/swiglu_blocked.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.grouped import grouped_matmul
from mixtral_jax.kernels.products import narrowed
from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel import same_variance

CHUNK = 1024  # rows that are read before any is written over


class SwigluGradient(NamedTuple):
    """Of a = gate * silu(h1) * h3, and a itself, which the gradient of the matrix behind it needs."""

    dh_R2F: Float[Array, "R twoF"]
    a_RF: Float[Array, "R F"]
    dgate_R: Float[Array, " R"]  # fp32


def swiglu(
    h_R2F: Float[Array, "R twoF"],
    gate_R: Float[Array, " R"] | None = None,
    inside_R1: Bool[Array, "R 1"] | None = None,
) -> Float[Array, "R F"]:
    """gate * silu(h1) * h3 in the dtype of h. `inside`: rows that count, the others are taken as 0."""
    h1_RF, h3_RF = (_selected(x_RF, inside_R1) for x_RF in jnp.split(h_R2F, 2, axis=-1))
    a_RF = jax.nn.silu(h1_RF) * h3_RF
    a_RF = a_RF if gate_R is None else a_RF * _selected(gate_R[:, None], inside_R1)
    return narrowed(a_RF, h_R2F.dtype)


def swiglu_gradient(
    h_R2F: Float[Array, "R twoF"],
    da_RF: Float[Array, "R F"],
    gate_R: Float[Array, " R"],
    inside_R1: Bool[Array, "R 1"] | None = None,
) -> SwigluGradient:
    """From da, that of the gated activation: silu' = s + silu (1 - s), s the sigmoid; dgate sums over F in fp32."""
    h1_RF, h3_RF = (_selected(x_RF, inside_R1) for x_RF in jnp.split(h_R2F, 2, axis=-1))
    da_RF, gate_R1 = _selected(da_RF, inside_R1), _selected(gate_R[:, None], inside_R1)
    s_RF = jax.nn.sigmoid(h1_RF)
    silu_RF = h1_RF * s_RF
    dgate_R = jnp.sum(da_RF * silu_RF * h3_RF, axis=-1)
    da_RF = da_RF * gate_R1
    dh1_RF = da_RF * h3_RF * (s_RF + silu_RF * (1 - s_RF))
    dh_R2F = jnp.concatenate([dh1_RF, da_RF * silu_RF], axis=-1)
    a_RF = gate_R1 * silu_RF * h3_RF
    return SwigluGradient(narrowed(dh_R2F, h_R2F.dtype), narrowed(a_RF, h_R2F.dtype), dgate_R)


def _selected(x_RF: jax.Array, inside_R1: jax.Array | None) -> jax.Array:
    """In fp32. The rows of nobody may hold anything, NaN too: select, never multiply.

    Of halves, for a selection from the whole of h is kept beside it: 5.8 GB at 8 sequences a chip of v5p-64.
    """
    return (x_RF if inside_R1 is None else jnp.where(inside_R1, x_RF, 0)).astype(jnp.float32)


def grouped_down(
    h_R2F: Float[Array, "R twoF"],
    gate_R: Float[Array, " R"],
    w_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, " E"],
    *,
    backend: str,
) -> Float[Array, "R D"]:
    """swiglu(h, gate) @ w[group of r]; rows behind the last group are undefined.

    The gate stands before the product: behind it, its gradient would need the product again.
    """
    return _grouped_down(backend, *same_variance(h_R2F, gate_R, w_EFD, group_sizes_E))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_down(backend: str, h_R2F: jax.Array, gate_R: jax.Array, w_EFD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    a_RF = swiglu(h_R2F, gate_R, (jnp.arange(h_R2F.shape[0]) < jnp.sum(sizes_E))[:, None])
    # typed as varying like the rows: else the transpose would sum over devices
    anywhere_RD, a_RF = same_variance(jnp.zeros((a_RF.shape[0], w_EFD.shape[2]), a_RF.dtype), a_RF)
    return jax.vjp(_up(backend, w_EFD, sizes_E), anywhere_RD)[1](a_RF)[0]


def _up(backend: str, w_EFD: jax.Array, sizes_E: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """g -> g @ w^T, the transpose of the product: a matrix sharded by D is gathered as (E, D, F) without a copy, and
    so all three products (this one, its two gradients) read or write it.
    """
    return lambda g_RD: grouped_matmul(g_RD, jnp.swapaxes(w_EFD, 1, 2), sizes_E, backend=backend)


def _vjp_backward(backend, saved, dy_RD):
    h_R2F, gate_R, w_EFD, sizes_E = saved
    da_RF = _up(backend, w_EFD, sizes_E)(dy_RD)
    dh_R2F, a_RF, dgate_R = gradient_in_place(h_R2F, da_RF, gate_R, jnp.sum(sizes_E))
    (dw_EFD,) = jax.vjp(lambda w_EFD: _up(backend, w_EFD, sizes_E)(dy_RD), w_EFD)[1](a_RF)
    return dh_R2F, dgate_R, dw_EFD, None


_grouped_down.defvjp(lambda backend, *args: (_grouped_down(backend, *args), args), _vjp_backward)


def gradient_in_place(
    h_R2F: Float[Array, "R twoF"], da_RF: Float[Array, "R F"], gate_R: Float[Array, " R"], rows: Int[Array, ""]
) -> SwigluGradient:
    """swiglu_gradient in the memory of h, da and the gates; 0 in rows from `rows` on."""
    chunks, rest = divmod(h_R2F.shape[0], CHUNK)

    def one(start: jax.Array | int, size: int, held: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # read all before any is written
        read = tuple(jax.lax.dynamic_slice_in_dim(x, start, size) for x in held)
        h_c2F, da_cF, gate_c = quirks.barrier(quirks.READS_AGAIN, read)
        new = swiglu_gradient(h_c2F, da_cF, gate_c, (start + jnp.arange(size) < rows)[:, None])
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, start, 0) for x, y in zip(held, new, strict=True))

    held: tuple[jax.Array, ...] = (h_R2F, da_RF, gate_R)
    if chunks:
        held = jax.lax.fori_loop(0, chunks, lambda i, held: one(i * CHUNK, CHUNK, held), held)
    return SwigluGradient(*(one(chunks * CHUNK, rest, held) if rest else held))
