"""Log-probabilities of continuations: what benchmarks and perplexities ask of a model.

Nothing is computed twice that requests share. Those that read the same tokens, or the first of them, are one row,
whichever of its tokens each asks about. Rows that begin alike, with few-shot examples or with one context of several
answers, are grouped so that the most tokens are saved: the beginning is read once into a cache, and each row goes on
from there. Rows of like lengths go together, and numbers of rows and columns are rounded up: to compile a program takes
longer than to run many a task. Under `jax.set_mesh(mesh)` the same calls run on the whole mesh; every process makes the
same ones and has all scores.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from mixtral_jax.generation import Cache, cache_slots, extend, inherit, prompt_states
from mixtral_jax.losses import Scores, linear_logps
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.parallel import BATCH_AXES, TOKEN_AXES, assemble, axis_max, gathered, platform, sharded, varying

SHORTEST = 64  # tokens; a shorter common beginning is not worth programs of its own
NARROWEST = 32  # columns; with powers of two from here on there are few programs
CACHE_BYTES = 2**30  # of one device's rows
DEEPEST = 64  # beginnings within beginnings that are looked at


class Continuation(NamedTuple):
    """Tokens that are asked about, and those before them: at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """Of each token of a continuation."""

    logps_T: Float[np.ndarray, " T"]  # log p of the token given all before it, nats
    best_T: Bool[np.ndarray, " T"]  # whether no token is likelier: greedy decoding takes it


def score(
    model: Mixtral,
    requests: Sequence[Continuation],
    *,
    longest: int | None = None,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> list[Score]:
    """The log-probability of each token of each continuation, softmax in fp32.

    Args:
        longest: tokens that the model reads at most, None: its max_position_embeddings; of a longer request the
            beginning is dropped.
        advance: is told how many more tokens are asked about in what is done.

    Raises:
        ValueError: a request without a context, of no tokens, of more than `longest`, or with ids of no tokens.
        FloatingPointError: a log-probability is NaN.
    """
    rows, ends = _rows(requests, longest or model.config.max_position_embeddings, model.config.vocab_size)
    logps, best = np.zeros(ends[-1], np.float32), np.zeros(ends[-1], bool)
    whole = gathered(model, compute_dtype(model.compute.dtype), beside=CACHE_BYTES)
    waiting: list[tuple[np.ndarray, Scores]] = []

    def fetch() -> None:
        slot_Q, found = waiting.pop()
        for place, values in zip((logps, best), found, strict=True):
            place[slot_Q[slot_Q >= 0]] = np.asarray(values)[slot_Q >= 0]
        advance(int(np.sum(slot_Q >= 0)))

    read, cache = None, None  # heads, and the cache behind them
    for batch in _batches(_groups(rows), partial(_most_rows, model)):
        if batch.heads is None or not batch.heads.same(read):
            cache = None  # let go before there is another
            cache = _read_heads(whole, batch.heads) if batch.heads is not None else None
            read = batch.heads
        found = _score_rows(whole, cache, batch.piece)
        while waiting:  # one batch behind, so that the devices always have something to do
            fetch()
        waiting.append((batch.slot_Q, found))
    while waiting:
        fetch()
    refuse_nan(model, logps)
    return [Score(logps[a:b], best[a:b]) for a, b in pairwise(ends)]


def refuse_nan(model: Mixtral, logps: np.ndarray) -> None:
    """Raises FloatingPointError."""
    if np.isnan(logps).any():
        dtype = compute_dtype(model.compute.dtype)
        raise FloatingPointError(f"log-probabilities are NaN: weights are not finite, or too large for {dtype}")


# ---- on the host: what is computed with what -------------------------------------------------------------------------


class _Row(NamedTuple):
    """Tokens that go through the model, and what is asked of them."""

    tokens: np.ndarray
    asked: list[tuple[int, int, int]]  # after which column which token, and where the answer goes

    @property
    def first(self) -> int:
        return min(column for column, _, _ in self.asked)


class _Group(NamedTuple):
    """Rows of which the first `shared` tokens are the same."""

    shared: int
    rows: list[_Row]


def _rows(requests: Sequence[Continuation], longest: int, vocab: int) -> tuple[list[_Row], list[int]]:
    """The rows, sorted, none of which begins another, and where the answers of each request lie."""
    asking: dict[bytes, list[tuple[int, int, int]]] = {}
    ends = [0]
    for i, (context, tokens) in enumerate(requests):
        if not (len(context) and 0 < len(tokens) <= longest):
            raise ValueError(
                f"request {i}: {len(tokens)} tokens behind {len(context)}; 1 to {longest} behind 1 or more"
            )
        whole = np.asarray([*context, *tokens][-longest - 1 :], ">i4")  # whose bytes have the order of the numbers
        if whole.min() < 0 or whole.max() >= vocab:
            raise ValueError(f"request {i} has tokens from {whole.min()} to {whole.max()}: the vocabulary has {vocab}")
        first = len(whole) - 1 - len(tokens)
        asked = [(first + j, int(token), ends[-1] + j) for j, token in enumerate(tokens)]
        asking.setdefault(whole[:-1].tobytes(), []).extend(asked)
        ends.append(ends[-1] + len(tokens))
    rows: list[tuple[bytes, list[tuple[int, int, int]]]] = []
    for key in sorted(asking, reverse=True):
        if rows and rows[-1][0].startswith(key):
            rows[-1][1].extend(asking[key])
        else:
            rows.append((key, asking[key]))
    return [_Row(np.frombuffer(key, ">i4"), asked) for key, asked in reversed(rows)], ends


def _groups(rows: Sequence[_Row]) -> list[_Group]:
    """Sorted rows in groups that save the most tokens: (rows - 1) times what they share, in each."""
    alike = [0, *(_alike(a.tokens, b.tokens) for a, b in pairwise(rows))]

    def best(start: int, stop: int, depth: int) -> tuple[int, list[_Group]]:
        inside = alike[start + 1 : stop]
        shared = min([*inside, *(row.first for row in rows[start:stop])]) if inside else 0
        saved = len(inside) * shared if shared >= SHORTEST else 0
        together = _Group(shared if saved else 0, list(rows[start:stop]))
        if not inside or depth == DEEPEST:
            return saved, [together]
        least = min(inside)
        cuts = [start, *(i for i in range(start + 1, stop) if alike[i] == least), stop]
        parts = [best(a, b, depth + 1) for a, b in pairwise(cuts)]
        apart = sum(part for part, _ in parts)
        return (saved, [together]) if saved >= apart else (apart, [group for _, groups in parts for group in groups])

    found = best(0, len(rows), 0)[1] if rows else []
    alone = [row for group in found if not group.shared for row in group.rows]
    return [*([_Group(0, alone)] if alone else []), *(group for group in found if group.shared)]


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens with which both begin."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class _Heads(NamedTuple):
    """What groups begin with, right-aligned."""

    tokens_GP: Any
    pad_G: Any  # columns before; all: no group

    def same(self, other: "_Heads | None") -> bool:
        return other is not None and all(map(np.array_equal, self, other))


class _Piece(NamedTuple):
    """The last columns of rows, right-aligned behind their heads, and what is asked of them."""

    tokens_BT: Any
    pad_B: Any  # columns of the whole row before its first token
    parent_B: Any  # the row's group
    shift_B: Any  # column of a token in its head, less its column in the row
    at_Q: Any  # b * T + t
    target_Q: Any
    wanted_Q: Any


class _Batch(NamedTuple):
    heads: _Heads | None  # None: nothing is shared
    piece: _Piece
    slot_Q: np.ndarray  # where the answers go; -1: nowhere


def _batches(groups: Sequence[_Group], most: Callable[[int, int], int]) -> Iterator[_Batch]:
    """Groups of more rows than go at once one after another; of others those of like sizes together.

    `most`: rows of a device's part of a batch, by the columns that they share and those behind.
    """
    shards, small = batch_shards(), dict[tuple[int, int], list[_Group]]()
    for shared, rows in groups:
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        size = _size(shared, rows[0])
        if shared and len(rows) <= most(*size):
            small.setdefault(size, []).append(_Group(shared, rows))
            continue
        while rows:
            size = _size(shared, rows[0])
            now = [row for row in rows[: most(*size) * shards] if _size(shared, row) == size]
            rows = rows[len(now) :]
            yield _pack([[_Group(shared, now[i::shards])] for i in range(shards)], size, most(*size))
    for size, parts in sorted(small.items(), reverse=True):
        bins: list[list[_Group]] = [[]]
        for part in parts:
            if sum(len(other.rows) for other in bins[-1]) + len(part.rows) > most(*size):
                bins.append([])
            bins[-1].append(part)
        for at in range(0, len(bins), shards):
            yield _pack((bins[at : at + shards] + [[]] * shards)[:shards], size, most(*size))


def _size(shared: int, row: _Row) -> tuple[int, int]:
    """Columns of what is shared, and behind."""
    return _power(shared, 2) if shared else 0, max(NARROWEST, _power(len(row.tokens) - shared, 2))


def _pack(bins: Sequence[Sequence[_Group]], size: tuple[int, int], B: int) -> _Batch:
    """A bin of up to B rows for each device's part of the batch."""
    P, T = size
    rows = [[(g, group.shared, row) for g, group in enumerate(bin) for row in group.rows] for bin in bins]
    G = _power(max(map(len, bins)), 4)
    Q = _power(max(4 * B, *(sum(len(row.asked) for *_, row in held) for held in rows)), 4)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((len(bins), *shape), np.int32)

    heads = _Heads(zeros(G, P), zeros(G) + P)
    piece = _Piece(zeros(B, T), zeros(B) + P + T, zeros(B), zeros(B), zeros(Q), zeros(Q), zeros(Q) > 0)
    slot = zeros(Q) - 1
    for d, (bin, held) in enumerate(zip(bins, rows, strict=True)):
        for g, (shared, own) in enumerate(bin if P else ()):
            if own:
                heads.tokens_GP[d, g, P - shared :], heads.pad_G[d, g] = own[0].tokens[:shared], P - shared
        q = 0
        for b, (g, _, row) in enumerate(held):
            n = len(row.tokens)
            piece.tokens_BT[d, b, max(T - n, 0) :], piece.pad_B[d, b] = row.tokens[-T:], P + T - n
            piece.parent_B[d, b], piece.shift_B[d, b] = g, heads.pad_G[d, g] - piece.pad_B[d, b]
            for column, target, place in row.asked:
                piece.at_Q[d, q], piece.target_Q[d, q], piece.wanted_Q[d, q] = b * T + column - n + T, target, True
                slot[d, q] = place
                q += 1

    def flat(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1, *a.shape[2:])

    return _Batch(_Heads(*map(flat, heads)) if P else None, _Piece(*map(flat, piece)), flat(slot))


def _power(count: int, base: int) -> int:
    """The next power."""
    power = 1
    while power < count:
        power *= base
    return power


def batch_shards() -> int:
    """Parts of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in BATCH_AXES)


def _most_rows(model: Mixtral, head: int, columns: int) -> int:
    """A power of four: rows that fill a device, and whose cache fits it."""
    config, mesh = model.config, dict(jax.sharding.get_abstract_mesh().shape)
    heads = config.num_hidden_layers * config.num_key_value_heads // mesh.get("tensor", 1)
    each = 2 * heads * config.head_dim * compute_dtype(model.compute.dtype).itemsize
    tokens = 2048 if platform() == "cpu" else 16384
    rows = min(tokens // columns, CACHE_BYTES // (each * (head + columns)))
    return 4 ** ((max(rows, 1).bit_length() - 1) // 2)


# ---- on the devices --------------------------------------------------------------------------------------------------

ROWS: Any = P(BATCH_AXES)
_SLOTS: Any = P(None, BATCH_AXES, "tensor")
CACHE = Cache(_SLOTS, _SLOTS)


@jax.jit
def _read_heads(model: Mixtral, heads: _Heads) -> Cache:
    """The cache behind them."""

    def local(model: Mixtral, heads: _Heads) -> Cache:
        _, cache = prompt_states(model, *heads, slots=heads.tokens_GP.shape[1])
        return jax.tree.map(lambda a: axis_max(a, ("context",)), cache)

    return sharded(local, model, (heads,), (_Heads(ROWS, ROWS),), CACHE)


@jax.jit
def _score_rows(model: Mixtral, cache: Cache | None, piece: _Piece) -> Scores:
    """Of every question of all devices' parts."""

    def local(model: Mixtral, cache: Cache | None, piece: _Piece) -> Scores:
        if cache is None:
            x_BTD, _ = prompt_states(model, piece.tokens_BT, piece.pad_B, slots=0)
        else:
            cache = Cache(*(varying(a, (*TOKEN_AXES, "tensor")) for a in cache))
            column, T = cache.k_LBKSH.shape[3], piece.tokens_BT.shape[1]
            slots = cache_slots(model.config.sliding_window, column + T, piece=T)
            cache = inherit(cache, piece.parent_B, piece.shift_B, column, slots)
            live_BT = jnp.ones_like(piece.tokens_BT, bool)
            x_BTD, _ = extend(model, cache, piece.tokens_BT, jnp.int32(column), piece.pad_B, live_BT)
        x_QD = x_BTD.reshape(-1, x_BTD.shape[-1])[piece.at_Q]
        scores = linear_logps(
            x_QD, model.head_weight(), piece.target_Q, piece.wanted_Q, chunk=model.compute.loss_chunk,
            vocab=model.config.vocab_size,
        )  # fmt: skip
        return jax.tree.map(lambda a: axis_max(assemble(a.astype(jnp.float32), 0, BATCH_AXES), ("context",)), scores)

    return sharded(local, model, (cache, piece), (P() if cache is None else CACHE, _Piece(*(ROWS,) * 7)), P())
