"""Weights held in 8 or 4 bits with a scale for each block: the frozen base under adapters (QLoRA 2305.14314).

A matrix is cut along its contracted dimension into blocks of at most `block` weights; every block of every output
column has its own fp32 scale. The matrices of a stack are quantised one by one, so codes and scales are sharded as the
weights are, and only the layer that is being computed is ever held in the compute dtype.
"""

import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int8, UInt8

from mixtral_jax.parallel import gather, inside, platform

Bits = Literal["int8", "nf4"]
# Appendix E of 2305.14314: quantiles of N(0, 1), scaled to [-1, 1], with an exact 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
Codes = Int8[Array, "..."] | UInt8[Array, "..."]  # (*A, n, block or block / 2, *O)


def quantize(w: Float[Array, "..."], axis: int, block: int, bits: Bits) -> tuple[Codes, Float[Array, "..."]]:
    """(codes, scales) of `w` (*A, I, *O), cut into blocks along `axis`; scales are (*A, n, *O).

    scale = max |w| of a block. int8: round(127 w / scale). nf4: the nearest of 16 levels (2305.14314, section 3), two
    to a byte: the first half of a block in the low bits, the second in the high ones.
    """
    blocks = w.shape[axis] // block
    w = w.astype(jnp.float32).reshape(*w.shape[:axis], blocks, block, *w.shape[axis + 1 :])
    scale = jnp.max(jnp.abs(w), axis=axis + 1)
    unit = w / jnp.expand_dims(jnp.where(scale > 0, scale, 1), axis + 1)
    if bits == "int8":
        return jnp.round(127 * unit).astype(jnp.int8), scale
    edges = [float(np.float32(low) + np.float32(high)) / 2 for low, high in itertools.pairwise(NF4)]
    level = sum((unit > edge).astype(jnp.uint8) for edge in edges)
    low, high = jnp.split(level, 2, axis=axis + 1)
    return low | (high << 4), scale


def dequantize(
    codes: Codes, scales: Float[Array, "..."], axis: int, bits: Bits, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """code * scale, in fp32 and then in `dtype`: (*A, I, *O) again."""
    if bits == "int8":
        unit = codes.astype(jnp.float32) / 127
    else:
        unit = _levels(jnp.concatenate([codes & 15, codes >> 4], axis=axis + 1))
    w = (unit * jnp.expand_dims(scales, axis + 1)).astype(dtype)
    return w.reshape(*w.shape[:axis], -1, *w.shape[axis + 2 :])


def _levels(codes: jax.Array) -> jax.Array:
    """NF4[codes], by selects: vector units have no table to look up in."""
    values: list[jax.Array | float] = list(NF4)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return jnp.asarray(values[0], jnp.float32)


class QuantizedWeight(nnx.Module):
    """A matrix in blocks, in place of an nnx.Param: `codes` and `scales`, sharded as the matrix would be."""

    def __init__(self, value: Float[Array, "..."], shape: dict[str, int], contracted: str, bits: Bits, block: int):
        axes, self.bits = tuple(shape), bits
        axis = axes.index(contracted)
        self.from_end = axis - len(axes)  # in a scan over layers the leading axes are gone
        size = math.gcd(shape[contracted], block)  # the most weights that divide both
        if bits == "nf4" and size % 2:
            raise ValueError(
                f"lora.base_dtype is nf4, which packs two weights to a byte: {contracted} ({shape[contracted]}) has no "
                f"even divisor in lora.base_block ({block})"
            )
        codes, scales = quantize(value, axis, size, bits)
        self.codes = nnx.Param(codes, axes=(*axes[: axis + 1], "quantized_block", *axes[axis + 1 :]))
        self.scales = nnx.Param(scales, axes=axes)

    def gathered(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix in the compute dtype, gathered like any other; the codes are what travels."""
        axis = self.scales[...].ndim + self.from_end
        codes, scales = gather(self.codes, self.codes[...].dtype), gather(self.scales, jnp.float32)
        w = dequantize(codes, scales, axis, self.bits, dtype)
        return checkpoint_name(w, "weights")


def gather_weight(weight: nnx.Param | QuantizedWeight, dtype: jnp.dtype, or_wider: bool = False) -> jax.Array:
    """A matrix in the compute dtype, however it is held; see parallel.sharding.gather.

    `or_wider`: on a single CPU one that is held in a wider dtype may stay in it.
    """
    if isinstance(weight, QuantizedWeight):
        return weight.gathered(dtype)
    w = weight[...]
    wider = or_wider and jnp.promote_types(w.dtype, dtype) == w.dtype
    return w if wider and platform() == "cpu" and not inside() else gather(weight, dtype)
