"""Products whose operands lie in memory as the CPU's libraries like them; elsewhere the compiler chooses.

On a CPU with instructions for bf16, products of two bf16 matrices that lie in rows, with an fp32 result, run at two to
six times the rate of fp32; all others are computed in fp32 (compiler_quirks.WIDENS_TRANSPOSED).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel import platform, same_variance, zeros


@cache
def native_bf16() -> bool:
    """Whether this machine's processor multiplies bf16: AVX512-BF16 or AMX, as Linux says."""
    file = Path("/proc/cpuinfo")
    return file.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(file.read_text(encoding="utf-8").split())


def _wants_rows(a: jax.Array) -> bool:
    return quirks.WIDENS_TRANSPOSED.here and a.dtype.itemsize == 2 and platform() == "cpu"


def in_rows(a: jax.Array) -> jax.Array:
    """`a`, laid out in rows where products of its dtype want that."""
    return with_layout_constraint(a, Layout(tuple(range(a.ndim)))) if _wants_rows(a) else a


def turned(w: jax.Array) -> jax.Array:
    """The last two dimensions exchanged, for the right side of a product."""
    return in_rows(jnp.swapaxes(w, -1, -2))


def turned_if(used: jax.Array, w: jax.Array) -> jax.Array:
    """The transpose of a matrix if it is `used`, else zeros: a copy apart from what makes `w` and takes the result."""
    if not (quirks.FUSES_TRANSPOSES.here and platform() == "cpu"):
        return turned(w)

    def turn(w: jax.Array) -> jax.Array:
        return with_layout_constraint(w.T, Layout((0, 1)))

    return jax.lax.cond(used, turn, lambda w: zeros(w.shape[::-1], w.dtype, w), w)


def turned_right(used: jax.Array, w: jax.Array) -> jax.Array:
    """The transpose of a matrix that is `used`, for the right side of a product: one of fp32 takes it as it lies."""
    return turned_if(used, w) if w.dtype.itemsize == 2 else w.T


def both_ways(w: jax.Array) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """`w`, and its transpose where a loop comes to use both: made ahead of the loop where it has to lie in rows."""
    if not _wants_rows(w):
        return w, lambda: turned(w)
    back = turned(w)
    return in_rows(w), lambda: back


def _widened(x: jax.Array) -> bool:
    return quirks.WIDENS_UPDATED.here and x.dtype.itemsize == 2 and platform() == "cpu"


def bits(x: jax.Array) -> jax.Array:
    """What a buffer of x holds where it is written in parts: x, or on a CPU the bits of a 16-bit float."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if _widened(x) else x


def from_bits(held: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x of bits(x)."""
    return held if held.dtype == dtype else jax.lax.bitcast_convert_type(held, dtype)


def narrowed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in `dtype`, as astype gives it; a NaN may be another."""
    to_bf16 = (x.dtype, dtype) == (jnp.float32, jnp.bfloat16)
    return _to_bf16(x) if quirks.NARROWS_SLOWLY.here and to_bf16 and platform() == "cpu" else x.astype(dtype)


@jax.custom_vjp
def _to_bf16(x: jax.Array) -> jax.Array:
    held = jax.lax.bitcast_convert_type(x, jnp.uint32)
    held = (held + jnp.uint32(0x7FFF) + ((held >> 16) & 1)) >> 16  # to the nearest, ties to even
    held = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), held)
    return jax.lax.bitcast_convert_type(held.astype(jnp.uint16), jnp.bfloat16)


_to_bf16.defvjp(lambda x: (_to_bf16(x), None), lambda _, g: (g.astype(jnp.float32),))


def saved(x: jax.Array, name: str) -> jax.Array:
    """checkpoint_name, of which a scan over layers keeps a stack of bits(x); no second derivative."""
    return _saved(x, name) if _widened(x) else checkpoint_name(x, name)


def _saved_bits(x: jax.Array, name: str) -> jax.Array:
    return from_bits(checkpoint_name(bits(x), name), x.dtype)


_saved = jax.custom_vjp(_saved_bits, nondiff_argnums=(1,))
_saved.defvjp(lambda x, name: (_saved_bits(x, name), None), lambda name, _, g: (g,))


def transposed(arrays: Any) -> Any:
    """Each array with its last two dimensions exchanged, for the left side: made before the product that takes it."""
    return quirks.barrier(quirks.SLOW_ON_TRANSPOSED_LEFT, jax.tree.map(turned, arrays))


def linear(x: Float[Array, "B T *I"], w: jax.Array) -> Float[Array, "B T *O"]:
    """x W in x's dtype, for W of shape (*I, *O); sums are in fp32."""
    inner = x.ndim - 2
    if not (_wants_rows(x) or _stands_alone(x.shape[0] * x.shape[1])):
        return jnp.tensordot(x, w, inner)
    x_MI = x.reshape(x.shape[0] * x.shape[1], -1)
    y_MO = _linear(*same_variance(x_MI, w.reshape(x_MI.shape[1], -1)))
    return y_MO.reshape(*x.shape[:2], *w.shape[inner:])


def _stands_alone(rows: int) -> bool:
    return rows == 1 and quirks.SLOW_ON_ONE_ROW.here and platform() == "cpu"


def product(x_MI: Float[Array, "M I"], w_IO: Float[Array, "I O"]) -> Float[Array, "M O"]:
    """x W in fp32. On a CPU what is one row is multiplied as two."""
    rows = x_MI.shape[0]
    x_MI = jnp.pad(x_MI, ((0, 1), (0, 0))) if _stands_alone(rows) else x_MI
    return jnp.dot(x_MI, w_IO, preferred_element_type=jnp.float32)[:rows]


@jax.custom_vjp
def _linear(x_MI: jax.Array, w_IO: jax.Array) -> jax.Array:
    return product(x_MI, w_IO).astype(x_MI.dtype)


def _backward(kept, g_MO):
    x_MI, w_IO = kept
    dw_IO = jnp.dot(transposed(x_MI), g_MO, preferred_element_type=jnp.float32)
    return _linear(g_MO, turned(w_IO)), dw_IO.astype(w_IO.dtype)


_linear.defvjp(lambda *args: (_linear(*args), args), _backward)
