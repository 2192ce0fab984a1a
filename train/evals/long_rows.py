"""How likely a model finds the tokens of long rows: piece by piece, in memory that does not grow with the logits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mixtral_jax.generation import Cache, cache_slots, extend
from mixtral_jax.kernels import bits
from mixtral_jax.losses import linear_logps
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.parallel import BATCH_AXES, TOKEN_AXES, assemble, axis_max, axis_size, gathered, sharded, varying
from mixtral_jax.train.evals.scoring import CACHE, CACHE_BYTES, ROWS, Score, batch_shards, refuse_nan

PIECE = 1024  # columns at a time
TOGETHER = 8192  # tokens of the rows that a device has at a time


class Piece(NamedTuple):
    """Some columns of rows: (B, T) each, numpy on the host."""

    tokens_BT: Any
    targets_BT: Any  # the tokens that follow
    wanted_BT: Any
    live_BT: Any


def score_long(
    model: Mixtral,
    rows: Sequence[Sequence[int]],
    *,
    first: Sequence[int] | None = None,
    piece: int = PIECE,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> list[Score]:
    """The tokens rows[b][first[b]:], each given all tokens before it, as the whole row at once would have them.

    A few rows go through the model together, `piece` columns at a time, with the keys and values of those before in a
    cache; logits are made of wanted tokens alone. Under `jax.set_mesh(mesh)` rows are spread over the mesh, and all its
    processes must call this alike.

    Args:
        rows: token ids, at least two a row, of about one length.
        first: place in each row, from 1; None: 1, as nothing stands before the first token.
        advance: told of the tokens that are done since the last time.

    Raises:
        FloatingPointError: a log-probability is NaN.
    """
    first = [1] * len(rows) if first is None else first
    longest = max(map(len, rows)) - 1
    piece = min(piece, -(-longest // 16) * 16)
    width = -(-longest // piece) * piece
    together = min(max(1, TOGETHER // width), -(-len(rows) // batch_shards())) * batch_shards()
    gathered_model = gathered(model, compute_dtype(model.compute.dtype), beside=CACHE_BYTES)
    found: list[Score] = []
    for start in range(0, len(rows), together):
        batch, places = rows[start : start + together], first[start : start + together]
        whole = _lay_out(batch, places, (together, width))
        cache, scores = _empty(model, together, cache_slots(model.config.sliding_window, width, piece)), []
        for at in range(0, width, piece):
            part = Piece(*(a[:, at : at + piece] for a in whole))
            new, cache = _score_piece(gathered_model, cache, part, jnp.int32(at))
            scores.append(np.asarray(new))
            advance(sum(min(max(len(row) - at, 0), piece) for row in batch))
        logp_BT, best_BT = np.concatenate(scores, axis=2)
        refuse_nan(model, logp_BT)
        wanted = [slice(place - 1, len(row) - 1) for place, row in zip(places, batch, strict=True)]
        found += [Score(logp_BT[b, own], best_BT[b, own] > 0) for b, own in enumerate(wanted)]
    return found


def _lay_out(rows: Sequence[Sequence[int]], first: Sequence[int], shape: tuple[int, int]) -> Piece:
    """All columns of rows, filled up at their ends."""
    whole = Piece(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, bool, bool)))
    for b, row in enumerate(rows):
        n = len(row) - 1
        whole.tokens_BT[b, :n], whole.targets_BT[b, :n] = row[:-1], row[1:]
        whole.wanted_BT[b, first[b] - 1 : n], whole.live_BT[b, :n] = True, True
    return whole


@partial(jax.jit, static_argnums=(1, 2))
def _empty(model: Mixtral, rows: int, slots: int) -> Cache:
    """Nothing yet of so many rows."""
    config, dtype = model.config, compute_dtype(model.compute.dtype)

    def local(_: Mixtral, row_B: jax.Array) -> Cache:
        heads = config.num_key_value_heads // axis_size("tensor")
        zeros = bits(jnp.zeros((config.num_hidden_layers, row_B.shape[0], heads, slots, config.head_dim), dtype))
        return Cache(*(varying(zeros, (*BATCH_AXES, "tensor")),) * 2)

    return sharded(local, model, (jnp.zeros(rows),), (ROWS,), CACHE)


@partial(jax.jit, donate_argnames="cache")
def _score_piece(
    model: Mixtral, cache: Cache, piece: Piece, column: Int[Array, ""]
) -> tuple[Float[Array, "2 B T"], Cache]:
    """Of wanted tokens log p, and 1 where no other is likelier; on every device those of all rows."""

    def local(model: Mixtral, cache: Cache, piece: Piece, column: jax.Array) -> tuple[jax.Array, Cache]:
        cache = Cache(*(varying(a, (*TOKEN_AXES, "tensor")) for a in cache))
        pad_B = jnp.zeros_like(piece.tokens_BT[:, 0])
        x_BTD, cache = extend(model, cache, piece.tokens_BT, column, pad_B, piece.live_BT)
        scores = linear_logps(
            x_BTD.reshape(-1, x_BTD.shape[-1]), model.head_weight(), piece.targets_BT.reshape(-1),
            piece.wanted_BT.reshape(-1), chunk=model.compute.loss_chunk, vocab=model.config.vocab_size,
        )  # fmt: skip
        found = jnp.stack(scores, dtype=jnp.float32).reshape(2, *piece.tokens_BT.shape)
        # the devices along `context` all hold the same: say so
        equal = partial(axis_max, axes=("context",))
        return equal(assemble(found, 1, BATCH_AXES)), jax.tree.map(equal, cache)

    return sharded(local, model, (cache, piece, column), (CACHE, Piece(*(ROWS,) * 4), P()), (P(), CACHE))
