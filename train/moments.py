"""How AdamW's moments are held from step to step: in fp32, in bf16, or in blocks of 8-bit floats with an fp32 scale.

All arithmetic of an update is fp32; only what is kept is rounded, and stochastically: up or down with the probability
that makes the mean exact. Rounding to nearest would not do. A second moment moves by at most 1 - b2 of itself towards a
smaller value; where that is below half of the spacing (bf16: 0.2 to 0.4 %, so from b2 = 0.997 on) it never falls again.
The random bits are a function of the update's number and of the place in the parameter: the same on any mesh, and after
a resume.

int8 (the idea: 8-bit optimizers, 2110.02861) keeps of a block of at most BLOCK numbers the largest magnitude, and of
each number its share of that as a float with 3 fraction bits: m in a sign and 127 levels down to 2^-16, or 0; v, whose
square root is divided by, in 256 levels down to 2^-32, and never as 0. Levels of equal distance, as of an ordinary
int8, would take most of v for 0. Spacing is 6 to 12 % of a number, whatever its size.

Blocks lie along a dimension that fsdp does not cut: ffn, head or rank. Embedding, head, router and norms stay fp32 with
int8, as do matrices without a divisor that fits: in 8x7B 0.6 % of all.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8, UInt32

StateDtype = Literal["float32", "bfloat16", "int8"]

BLOCK, SMALLEST_BLOCK = 128, 32
FRACTION = 20  # bits of an fp32 that a code leaves out: 3 of 23 fraction bits stay
ONE = 0x3F800000 >> FRACTION  # 1.0, the largest share of a block, as its sign, exponent and 3 fraction bits
BELOW_M, BELOW_V = ONE - 127, ONE - 255  # what a code is counted from: m's 0 stands for 0, v's 0 for the least level


class Blocks(NamedTuple):
    """A moment in 8 bits. m: int8, v: uint8, of the parameter's shape; scales have fewer along the cut dimension."""

    codes: Int8[Array, "..."] | UInt8[Array, "..."]
    scales: Float[Array, "..."]


Moment = Float[Array, "..."] | Blocks
Tree = Any  # nested dict with a leaf for each parameter


def is_moment(x: Any) -> bool:
    """Whether it is one parameter's moment: Blocks are a tree for jax."""
    return isinstance(x, Blocks) or hasattr(x, "dtype")


def block_of(names: Sequence[str], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(dimension from the end, length) of the blocks of the parameter with this path; None: it stays fp32.

    The length divides an eighth of the dimension if one from SMALLEST_BLOCK to BLOCK does, so that tensor shards hold
    whole blocks; else a quarter, a half, all of it.
    """
    if names[0] != "layers" or names[-1] in ("router", "scale"):
        return None
    axis = -2 if (names[-2] if names[-1] in ("a", "b") else names[-1]).startswith(("w2", "output")) else -1
    for pieces in (8, 4, 2, 1):
        piece, left = divmod(shape[axis], pieces)
        for length in range(BLOCK, SMALLEST_BLOCK - 1, -1):
            if not left and piece % length == 0:
                return axis, length
    return None


def moment_bytes(names: Sequence[str], shape: tuple[int, ...], dtype: StateDtype) -> float:
    """Of one number of one moment."""
    if dtype == "int8":
        block = block_of(names, shape)
        return 4.0 if block is None else 1 + 4 / block[1]
    return float(jnp.dtype(dtype).itemsize)


def zeros(params: Tree, dtype: StateDtype) -> tuple[Tree, Tree]:
    """(m, v) before the first update."""

    def make(path: tuple[Any, ...], p: Any, codes: Any) -> Moment:
        block = block_of([str(key.key) for key in path], p.shape) if dtype == "int8" else None
        if block is None:
            return jnp.zeros(p.shape, "float32" if dtype == "int8" else dtype)
        fewer = list(p.shape)
        fewer[block[0]] //= block[1]
        return Blocks(jnp.zeros(p.shape, codes), jnp.zeros(fewer, jnp.float32))

    m, v = (
        jax.tree_util.tree_map_with_path(lambda path, p, codes=codes: make(path, p, codes), params)
        for codes in (jnp.int8, jnp.uint8)
    )
    return m, v


def read(tree: Tree) -> Tree:
    """Moments as fp32."""
    return jax.tree.map(_read, tree, is_leaf=is_moment)


def write(m: Tree, v: Tree, held: tuple[Tree, Tree], key: jax.Array) -> tuple[Tree, Tree]:
    """fp32 moments as `held` holds others; `key` is of the update."""
    held_m, structure = jax.tree.flatten(held[0], is_leaf=is_moment)
    held_v = jax.tree.leaves(held[1], is_leaf=is_moment)
    kept_m, kept_v = [], []
    for i, (x, y, a, b) in enumerate(zip(jax.tree.leaves(m), jax.tree.leaves(v), held_m, held_v, strict=True)):
        if isinstance(a, Blocks) or a.dtype != jnp.float32:
            random = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint32)
            x, y = _write(x, a, random & 0xFFFF), _write(y, b, random >> 16)
        kept_m.append(x)
        kept_v.append(y)
    return jax.tree.unflatten(structure, kept_m), jax.tree.unflatten(structure, kept_v)


def _read(moment: Moment) -> Float[Array, "..."]:
    if not isinstance(moment, Blocks):
        return moment.astype(jnp.float32)
    codes = moment.codes.astype(jnp.int32)
    if moment.codes.dtype == jnp.uint8:
        share = _float((codes + BELOW_V) << FRACTION)
    else:
        share = jnp.sign(codes) * _float((jnp.abs(codes) + BELOW_M) << FRACTION)
    return (_blocked(share, moment.scales) * _beside(moment.scales, share)).reshape(share.shape)


def _write(x: Float[Array, "..."], like: Moment, random: UInt32[Array, "..."]) -> Moment:
    """`random` holds 16 bits for each number."""
    if not isinstance(like, Blocks):
        up = jax.lax.bitcast_convert_type(x, jnp.uint32) + random
        return jax.lax.bitcast_convert_type((up >> 16).astype(jnp.uint16), jnp.bfloat16)
    axis = _cut(x, like.scales) + 1
    scales = jnp.max(jnp.abs(_blocked(x, like.scales)), axis=axis)
    least = jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)
    share = (_blocked(jnp.abs(x), scales) / _beside(least, x)).reshape(x.shape)
    random = ((random << (FRACTION - 16)) + (1 << (FRACTION - 17))).astype(jnp.int32)  # the middle of its 2^16th
    below = BELOW_M if like.codes.dtype == jnp.int8 else BELOW_V
    if below == BELOW_V:
        return Blocks(_code(jnp.maximum(share, _level(below)), random, below).astype(jnp.uint8), scales)
    least_level = _level(below + 1)
    lowest = (random + share * (2**FRACTION / least_level) >= 2**FRACTION).astype(jnp.int32)  # 0 or the level above
    code = jnp.where(share < least_level, lowest, _code(share, random, below))
    return Blocks((jnp.where(x < 0, -code, code)).astype(jnp.int8), scales)


def _code(share: Float[Array, "..."], random: jax.Array, below: int) -> jax.Array:
    """The level below a share, or the one above it; a carry out of the fraction is the next exponent."""
    levels = (jax.lax.bitcast_convert_type(share, jnp.int32) + random) >> FRACTION
    return jnp.minimum(levels, ONE) - below


def _level(bits: int) -> Any:
    return _float(jnp.int32(bits << FRACTION))


def _float(bits: jax.Array) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _cut(x: jax.Array, scales: jax.Array) -> int:
    """The dimension along which blocks lie."""
    return next(i for i, (size, blocks) in enumerate(zip(x.shape, scales.shape, strict=True)) if size != blocks)


def _blocked(x: jax.Array, scales: jax.Array) -> jax.Array:
    """(*A, n, block, *O)."""
    axis = _cut(x, scales)
    return x.reshape(*scales.shape[: axis + 1], -1, *scales.shape[axis + 1 :])


def _beside(scales: jax.Array, x: jax.Array) -> jax.Array:
    """(*A, n, 1, *O)."""
    return jnp.expand_dims(scales, _cut(x, scales) + 1)
