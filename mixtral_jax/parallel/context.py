"""Which tokens of a row each device of the `context` axis holds.

Under a causal mask late queries see more keys than early ones. Cut in 2C pieces, of which device i of C holds piece i
and piece 2C - 1 - i, every device has the same share of the work. Rows come and go in their own order: they are
exchanged on entering the model's shard_map and on leaving it (`sharding.sharded`), and nothing outside knows. Inside,
positions and segments travel with their tokens and carry the truth; keys and values, which every device gathers
whole, are put back in order so that attention can skip what no query sees.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

AXIS = "context"


class Part(NamedTuple):
    """The part of a row that one device holds, in zig-zag order: part `own` of so many `parts`."""

    parts: int
    own: Int[Array, ""]


def zigzag(length: int, count: int) -> np.ndarray:
    """Place in the row of each token, device after device: (length,) = count parts of length / count.

    Raises:
        ValueError: the row cannot be cut into 2 * count equal pieces.
    """
    if length % (2 * count):
        raise ValueError(
            f"rows of {length} tokens cannot be cut into 2 x {count} equal pieces (mesh.context {count}): "
            f"make seq_len a multiple of {2 * count}, or choose a smaller mesh.context"
        )
    pieces = np.arange(length).reshape(2 * count, -1)
    return np.concatenate([pieces[[i, 2 * count - 1 - i]].reshape(-1) for i in range(count)])


def places(part: Part, tokens: int) -> Int[Array, " T"]:
    """Place in the row of each of this device's `tokens` tokens."""
    half = jnp.arange(tokens // 2, dtype=jnp.int32)
    low = part.own.astype(jnp.int32) * (tokens // 2)
    high = (2 * part.parts - 1 - part.own).astype(jnp.int32) * (tokens // 2)
    return jnp.concatenate([low + half, high + half])


def spread(x_BT: jax.Array) -> jax.Array:
    """From contiguous parts of the row to the zig-zag ones, along the second dimension, inside a shard_map."""
    even, odd = _halves(x_BT)
    moves = _moves(jax.lax.axis_size(AXIS))
    back = [[(t, s) for s, t in move] for move in moves]
    low = jax.lax.ppermute(even, AXIS, back[0]) + jax.lax.ppermute(odd, AXIS, back[1])
    high = jax.lax.ppermute(odd, AXIS, back[2]) + jax.lax.ppermute(even, AXIS, back[3])
    return jnp.concatenate([low, high], axis=1)


def unspread(x_BT: jax.Array) -> jax.Array:
    """The inverse of `spread`."""
    low, high = _halves(x_BT)
    moves = _moves(jax.lax.axis_size(AXIS))
    even = jax.lax.ppermute(low, AXIS, moves[0]) + jax.lax.ppermute(high, AXIS, moves[3])
    odd = jax.lax.ppermute(low, AXIS, moves[1]) + jax.lax.ppermute(high, AXIS, moves[2])
    return jnp.concatenate([even, odd], axis=1)


def gather_row(x_BT: jax.Array) -> jax.Array:
    """All tokens of the row in order, gathered from the parts; the transpose is a reduce-scatter."""
    x_BCT = jax.lax.all_gather(x_BT, AXIS, axis=1)
    low, high = jnp.split(x_BCT, 2, axis=2)
    shape = (x_BT.shape[0], -1, *x_BT.shape[2:])
    return jnp.concatenate([low.reshape(shape), high[:, ::-1].reshape(shape)], axis=1)


def _halves(x_BT: jax.Array) -> list[jax.Array]:
    """The two pieces that a device holds."""
    if x_BT.shape[1] % 2:
        count = jax.lax.axis_size(AXIS)
        zigzag(x_BT.shape[1] * count, count)
    return jnp.split(x_BT, 2, axis=1)


def _moves(count: int) -> list[list[tuple[int, int]]]:
    """(from, to) of the piece exchanges: low -> even, low -> odd, high -> odd, high -> even.

    Device i holds pieces i (low) and 2C - 1 - i (high); in order, device j holds pieces 2j (even) and 2j + 1 (odd).
    """
    low = [(i, i // 2) for i in range(count)]
    high = [(i, (2 * count - 1 - i) // 2) for i in range(count)]
    return [low[0::2], low[1::2], high[0::2], high[1::2]]
