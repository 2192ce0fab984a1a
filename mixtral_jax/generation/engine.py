"""Text generation: prompts of different lengths in one batch, one jitted loop until every row has ended.

Lengths are rounded up before anything is compiled, so that few programs serve all prompts. Under `jax.set_mesh(mesh)`
the same calls run on the whole mesh; weights that it only stores in parts are gathered once per call, not once per
token, where they fit the devices' memory.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from mixtral_jax.generation.cache import Cache, Held, cache_slots, decode, prefill
from mixtral_jax.generation.few_rows import Apart, apart_bytes, take_apart, wants_apart
from mixtral_jax.generation.sampling import Drawing, Sampler, is_whole, make_sampler, sample
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.parallel import (
    BATCH_AXES,
    TOKEN_AXES,
    assemble,
    axis_max,
    free_memory,
    gathered,
    psum,
    sharded,
    varying,
)

SMALLEST = 16  # prompt columns and new tokens are rounded up to 16, 24, 32, 48, 64, 96, ...

Prompts = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


class Aligned(NamedTuple):
    """Prompts as one array, and what ends them."""

    tokens_BT: Int[Array, "B T"]  # right-aligned
    pad_B: Int[Array, " B"]  # columns before the prompt; all of them: no prompt, nothing is generated
    number_B: Int[Array, " B"]  # whose stream of random numbers a row draws from
    eos_N: Int[Array, " N"]  # tokens that end a row


class State(NamedTuple):
    """What a step of decoding takes and gives."""

    cache: Held
    token_B: Int[Array, " B"]  # the newest token, not in the cache yet
    done_B: Bool[Array, " B"]
    drawn: Int[Array, ""]  # tokens so far


_BATCH: Any = P(BATCH_AXES)
_SLOTS: Any = P(None, BATCH_AXES, "tensor")
_EVERYWHERE: Any = P()
_ROWS = Aligned(_BATCH, _BATCH, _BATCH, _EVERYWHERE)
_STATE = State(Cache(_SLOTS, _SLOTS), _BATCH, _BATCH, _EVERYWHERE)


def generate(
    model: Mixtral,
    tokens: Prompts,
    *,
    max_new_tokens: int = 64,
    eos_id: int | Sequence[int] | None = None,
    lengths: Sequence[int] | np.ndarray | None = None,
    numbers: Sequence[int] | None = None,
    **drawing: Unpack[Drawing],
) -> Any:
    """Continue prompts; what comes back are the new tokens alone, without the prompt.

    Args:
        tokens: a prompt, a list of prompts of any lengths, or an array (T,) or (B, T).
        max_new_tokens: most tokens per row.
        eos_id: token, or tokens, that end a row; None: every row gets max_new_tokens.
        lengths: of the prompts in an array (B, T), which are padded at the end; each from 1 to T.
        numbers: of each prompt, by which it draws the same in whatever batch; None: its place in this one.
        drawing: temperature (0, the default, takes the likeliest token), top_k, top_p, seed; see sampling.Drawing.

    Returns:
        For lists the new tokens as lists, the ending token included. For an array an int32 array (..., max_new_tokens),
        filled with (the first) eos_id behind the end.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or a setting out of range.
        FloatingPointError: logits of a prompt are NaN. No token would say so, and to look costs nothing: those of NaN
            are drawn as a number that is no token.
    """
    sampler, most = make_sampler(**drawing), _positive("max_new_tokens", max_new_tokens)
    rows = _read_prompts(model, tokens, lengths, eos_id, numbers)
    count = len(rows.prompts)
    if not count:
        return np.zeros((0, most), np.int32) if rows.is_array else []
    columns = _round_up(most)
    batch, slots = _right_align(rows, columns)
    ready, limit = _ready(model, batch, slots, max_new_tokens), jnp.int32(max_new_tokens)
    out_BN = _run(*ready, batch, sampler, limit, slots=slots, columns=columns)
    out_BN = np.asarray(out_BN)[:count, :max_new_tokens]
    _refuse_nan(model, out_BN, rows.numbers, first=1)
    ended = [_until(row, rows.eos) for row in out_BN.tolist()]
    _warn_of_length(model, max(len(p) + len(new) for p, new in zip(rows.prompts, ended, strict=True)))
    if rows.is_array:
        return out_BN[0] if rows.single else out_BN
    return ended[0] if rows.single else ended


def check_options(*, max_new_tokens: int = 64, **drawing: Unpack[Drawing]) -> None:
    """Raise the ValueError of `generate` for a setting out of range, before there is a model."""
    make_sampler(**drawing)
    _positive("max_new_tokens", max_new_tokens)


def stream(
    model: Mixtral,
    tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    eos_id: int | Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
    width: int = 0,
    **drawing: Unpack[Drawing],
) -> Iterator[list[int | None]]:
    """The tokens of `generate`, as they come: for every step each row's token, None for a row that has ended.

    The prompts are padded to `width` tokens at least: calls that have the same share a program.
    """
    rows = _read_prompts(model, list(tokens), None, eos_id, numbers)
    sampler = make_sampler(**drawing)
    batch, slots = _right_align(rows, _round_up(_positive("max_new_tokens", max_new_tokens)), width)
    ended, ready = np.zeros(len(rows.prompts), bool), _ready(model, batch, slots, max_new_tokens)
    state, seen = _start(*ready, batch, sampler, slots=slots)
    for number in range(1, max_new_tokens + 1):
        new, done = np.asarray(seen)[:, : len(ended)]
        _refuse_nan(model, np.where(ended, 0, new)[:, None], rows.numbers, first=number)
        yield [None if end else int(token) for token, end in zip(new, ended, strict=True)]
        length = max(len(p) + number for p, end in zip(rows.prompts, ended, strict=True) if not end)
        if number == 1 or length == model.config.max_position_embeddings + 1:  # once
            _warn_of_length(model, length)
        ended = done > 0
        if ended.all() or number == max_new_tokens:
            return
        state, seen = _step(*ready, state, batch, sampler)


# ---- on the device ---------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="slots")
def _start(
    model: Mixtral, apart: Apart | None, rows: Aligned, sampler: Sampler, *, slots: int
) -> tuple[State, Int[Array, "2 B"]]:
    """Prefill, and the first token; with what `_seen` shows."""

    def local(model: Mixtral, rows: Aligned, sampler: Sampler) -> tuple[State, jax.Array]:
        return _seen(_first(model, apart, rows, sampler, slots))

    return sharded(local, model, (rows, sampler), (_ROWS, P()), (_STATE, P()))


@partial(jax.jit, donate_argnames="state")
def _step(
    model: Mixtral, apart: Apart | None, state: State, rows: Aligned, sampler: Sampler
) -> tuple[State, Int[Array, "2 B"]]:
    """One token more."""

    def local(model: Mixtral, state: State, rows: Aligned, sampler: Sampler) -> tuple[State, jax.Array]:
        return _seen(_next(model, apart, _varying(state), rows, sampler))

    return sharded(local, model, (state, rows, sampler), (_STATE, _ROWS, P()), (_STATE, P()))


@partial(jax.jit, static_argnames=("slots", "columns"))
def _run(
    model: Mixtral,
    apart: Apart | None,
    rows: Aligned,
    sampler: Sampler,
    limit: Int[Array, ""],
    *,
    slots: int,
    columns: int,
) -> Int[Array, "B columns"]:
    """The tokens of each row up to `limit`, which is at most `columns`; behind a row's end its ending token."""

    def local(model: Mixtral, rows: Aligned, sampler: Sampler, limit: jax.Array) -> jax.Array:
        def body(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
            state, out_BN, _ = carry
            state = _varying(_next(model, apart, state, rows, sampler))
            out_BN = jax.lax.dynamic_update_slice(out_BN, state.token_B[:, None], (0, state.drawn - 1))
            return state, out_BN, _rows_left(state)

        state = _varying(_first(model, apart, rows, sampler, slots))
        out_BN = jnp.pad(state.token_B[:, None], ((0, 0), (0, columns - 1)))
        carry = (state, out_BN, _rows_left(state))
        _, out_BN, _ = jax.lax.while_loop(lambda c: (c[0].drawn < limit) & (c[2] > 0), body, carry)
        fill_B1 = rows.eos_N[:1][None, :] if rows.eos_N.size else jnp.zeros((1, 1), jnp.int32)
        end_BN = _is_end(out_BN, rows).astype(jnp.int32)
        out_BN = jnp.where(jnp.cumsum(end_BN, axis=1) > end_BN, fill_B1, out_BN)
        return axis_max(assemble(out_BN, 0, BATCH_AXES), ("context",))

    return sharded(local, model, (rows, sampler, limit), (_ROWS, P(), P()), P())


def _first(model: Mixtral, apart: Apart | None, rows: Aligned, sampler: Sampler, slots: int) -> State:
    logits_BV, cache = prefill(model, rows.tokens_BT, rows.pad_B, slots)
    held: Held = cache if apart is None else tuple(map(Cache, *cache))
    done_B = rows.pad_B == rows.tokens_BT.shape[1]
    return _draw(logits_BV, held, done_B, jnp.int32(0), rows, sampler)


def _next(model: Mixtral, apart: Apart | None, state: State, rows: Aligned, sampler: Sampler) -> State:
    column = rows.tokens_BT.shape[1] + state.drawn - 1
    logits_BV, cache = decode(model, state.cache, state.token_B, column, rows.pad_B, ~state.done_B, apart)
    return _draw(logits_BV, cache, state.done_B, state.drawn, rows, sampler)


def _draw(
    logits_BV: jax.Array, cache: Held, done_B: jax.Array, count: jax.Array, rows: Aligned, sampler: Sampler
) -> State:
    token_B = sample(logits_BV, sampler, rows.number_B, count)
    is_nan_B = token_B == logits_BV.shape[1]
    return State(cache, token_B, done_B | _is_end(token_B, rows) | is_nan_B, count + 1)


def _is_end(tokens: jax.Array, rows: Aligned) -> jax.Array:
    return jnp.any(tokens[..., None] == jnp.expand_dims(rows.eos_N, tuple(range(tokens.ndim))), axis=-1)


def _rows_left(state: State) -> jax.Array:
    return psum(jnp.sum(~state.done_B), TOKEN_AXES)


def _varying(state: State) -> State:
    """Typed as a step returns it: weights that were gathered differ, for all that jax knows, on every device."""
    cache = jax.tree.map(lambda a: varying(a, (*TOKEN_AXES, "tensor")), state.cache)
    return State(cache, varying(state.token_B, TOKEN_AXES), varying(state.done_B, TOKEN_AXES), state.drawn)


def _seen(state: State) -> tuple[State, jax.Array]:
    """With the newest tokens, and which rows have ended, of all rows on every device: a process reads only its own."""
    state = axis_max(state, ("context",))  # they hold the same: say so
    return state, assemble(jnp.stack([state.token_B, state.done_B.astype(jnp.int32)]), 1, BATCH_AXES)


# ---- on the host -----------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What the caller gave, read."""

    prompts: list[list[int]]
    numbers: Sequence[int]
    eos: list[int]
    window: int | None
    is_array: bool
    single: bool


def _read_prompts(
    model: Mixtral, tokens: Prompts, lengths: Any, eos_id: int | Sequence[int] | None, numbers: Sequence[int] | None
) -> _Request:
    is_array = isinstance(tokens, np.ndarray | jax.Array)
    table: Any = np.asarray(tokens).tolist() if is_array else list(tokens)
    single = bool(table) and np.ndim(table[0]) == 0
    prompts = [list(map(int, row)) for row in ([table] if single else table)]
    if lengths is not None:
        prompts = [row[:n] for row, n in zip(prompts, _read_lengths(lengths, prompts), strict=True)]
    vocab = model.config.vocab_size
    for i, row in enumerate(prompts):
        if not row:
            raise ValueError(f"prompt {i} is empty: begin it with the BOS token")
        if min(row) < 0 or max(row) >= vocab:
            raise ValueError(f"prompt {i} has tokens from {min(row)} to {max(row)}: the vocabulary has {vocab}")
    eos = [] if eos_id is None else [int(i) for i in np.atleast_1d(eos_id)]
    numbers = range(len(prompts)) if numbers is None else numbers
    return _Request(prompts, numbers, eos, model.config.sliding_window, is_array, single)


def _warn_of_length(model: Mixtral, length: int) -> None:
    if length > (limit := model.config.max_position_embeddings):
        warnings.warn(
            f"prompt and text reach {length} tokens, the model was made for max_position_embeddings = {limit}: what "
            "stands behind them is worth little",
            stacklevel=3,
        )


def _read_lengths(lengths: Any, prompts: list[list[int]]) -> list[int]:
    found = np.asarray(lengths)
    wanted = f"it must be one integer for each of the {len(prompts)} prompts"
    if found.shape != (len(prompts),):
        raise ValueError(f"lengths has shape {found.shape}: {wanted}")
    if found.size and found.dtype.kind not in "iu":
        raise ValueError(f"lengths has numbers of {found.dtype}: {wanted}")
    for i, (n, row) in enumerate(zip(found, prompts, strict=True)):
        if not 1 <= n <= len(row):
            raise ValueError(f"lengths has {n} for prompt {i}: it must be from 1 to {len(row)}, the tokens of its row")
    return found.tolist()


def _refuse_nan(model: Mixtral, new_BN: np.ndarray, numbers: Sequence[int], first: int) -> None:
    """`first`: number of the new tokens in the first column."""
    for row, column in np.argwhere(new_BN == model.config.vocab_size)[:1]:
        raise FloatingPointError(
            f"continuation {numbers[row]}: the logits of its token {first + column} are NaN: weights are not "
            f"finite, or too large for {compute_dtype(model.compute.dtype)}"
        )


def _right_align(request: _Request, new_columns: int, width: int = 0) -> tuple[Aligned, int]:
    """Prompts as an array whose last column is the last token of each, and the cache's slots."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
    width = max(width, _round_up(max(map(len, request.prompts))))
    rows = -(-len(request.prompts) // shards) * shards
    tokens_BT: Any = np.zeros((rows, width), np.int32)
    pad_B: Any = np.full(rows, width, np.int32)
    number_B: Any = np.zeros(rows, np.int32)
    number_B[: len(request.prompts)] = request.numbers
    eos_N: Any = np.array(request.eos, np.int32)
    for b, prompt in enumerate(request.prompts):
        pad_B[b] = width - len(prompt)
        tokens_BT[b, pad_B[b] :] = prompt
    slots = cache_slots(request.window, width + new_columns)
    return Aligned(tokens_BT, pad_B, number_B, eos_N), slots


def _ready(model: Mixtral, rows: Aligned, slots: int, new_tokens: int) -> tuple[Mixtral, Apart | None]:
    """The model with its matrices gathered and cast for the whole call, or its layers taken apart where products on a
    few rows want that: where it fits beside the cache.
    """
    config, mesh = model.config, dict(jax.sharding.get_abstract_mesh().shape)
    shards, dtype = math.prod(mesh.get(a, 1) for a in (*BATCH_AXES, "tensor")), compute_dtype(model.compute.dtype)
    columns = rows.tokens_BT.shape[0] * slots * config.num_hidden_layers
    cache = columns * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize // shards
    if math.prod(mesh.values()) == 1 and wants_apart(model, rows.tokens_BT.shape[0], new_tokens):
        prompts = 3 * rows.tokens_BT.size * config.num_experts_per_tok * config.intermediate_size * dtype.itemsize
        taken = apart_bytes(model) + 2 * cache + prompts
        if taken <= free_memory():
            return gathered(model, dtype, beside=taken, layers=False), take_apart(model)
    return gathered(model, dtype, beside=cache), None


def _round_up(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most half as many again."""
    power = SMALLEST
    while power < size:
        power *= 2
    smaller = power * 3 // 4
    return smaller if power > SMALLEST and smaller >= size else power


def _positive(name: str, value: int) -> int:
    if not (is_whole(value) and value >= 1):
        raise ValueError(f"{name} is {value}: it must be a whole number of at least 1")
    return value


def _until(row: list[int], eos: list[int]) -> list[int]:
    """Up to and with the first ending token."""
    end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
    return row[: end + 1]
