"""Attention in tiles, with its own derivative: the T x S score matrix never exists as a whole.

softmax(q k^T / sqrt(H)) v over one tile of queries and keys at a time, with a running maximum and a running sum
(FlashAttention, arXiv 2205.14135, algorithm 1); only the output and log-sum-exp of each row are saved, and the backward
pass computes each tile's probabilities again. Tiles that the mask empties, above the diagonal, before the window or
before the oldest segment of their queries, are not visited at all: their cost is gone from the loop, not masked away.

Layout: the G query heads of a kv head are rows of one matrix, R = block_T * G, so that one product serves them all.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.kernels.products import bits, from_bits, narrowed, transposed
from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel import same_variance

# Name of what the backward pass needs besides q, k and v, for rematerialisation: a policy that saves it runs no
# forward attention twice.
SAVED = "attended"
NEVER = -1e30  # a score that no key reaches: finite, so that rows without any key give no NaN


class Tiling(NamedTuple):
    """How T queries and S keys are cut, and which key blocks first <= j < stop query block i visits at most. Static."""

    block_T: int
    block_S: int
    first: tuple[int, ...]
    stop: tuple[int, ...]


class Tokens(NamedTuple):
    """Where each token stands: all that a mask is made of. (B, T), or cut in blocks: (blocks, B, block)."""

    positions: Array  # restart at 0 in every segment
    segments: Array  # 0 is padding


def tile(T: int, S: int, block_T: int, block_S: int, *, window: int | None, ordered: bool) -> Tiling:
    """The tiles that attention must visit: all of them, or with `ordered` those on and below the diagonal.

    In an ordered row each segment is a run of neighbours whose positions go up by one: a key of a higher index, or
    one that is `window` or more indices behind, is never seen.
    """
    key_blocks = math.ceil(S / block_S)
    first, stop = [], []
    for start in range(0, T, block_T):
        end = min(start + block_T, T)  # the queries start ... end - 1
        oldest = max(0, start - window + 1) if ordered and window is not None else 0
        first.append(min(oldest // block_S, key_blocks - 1))
        stop.append(min(math.ceil(end / block_S), key_blocks) if ordered else key_blocks)
    return Tiling(block_T, block_S, tuple(first), tuple(stop))


def part_bounds(tiling: Tiling, places_T: Array, window: int | None) -> tuple[Array, Array]:
    """First key block and last + 1 of each query block, for queries that stand at `places_T` in an ordered row."""
    blocks = len(tiling.first)
    places_iT = jnp.pad(places_T, (0, blocks * tiling.block_T - places_T.shape[0]), mode="edge").reshape(blocks, -1)
    oldest_i = jnp.zeros((blocks,), jnp.int32) if window is None else jnp.min(places_iT, axis=1) - window + 1
    return jnp.maximum(oldest_i, 0) // tiling.block_S, jnp.max(places_iT, axis=1) // tiling.block_S + 1


def segment_begins(segments_BT: Array) -> Array:
    """Place of the first token of each token's segment, in ordered rows. Padding (segment 0) ends no segment."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    real_BT = segments_BT != 0
    before_BT = jnp.pad(lax.cummax(jnp.where(real_BT, index_BT, -1), axis=1), ((0, 0), (1, 0)), constant_values=-1)
    before_BT = before_BT[:, :-1]  # the last token before this one that is no padding
    other_BT = segments_BT != jnp.take_along_axis(segments_BT, jnp.maximum(before_BT, 0), axis=1)
    return lax.cummax(jnp.where(real_BT & (other_BT | (before_BT < 0)), index_BT, 0), axis=1)


def segment_bounds(tiling: Tiling, segments_BT: Array) -> tuple[Array, Array]:
    """First key block and last + 1 of each query block of ordered rows: no key before a query's own segment is seen."""
    T, blocks = segments_BT.shape[1], len(tiling.first)
    oldest_T = jnp.min(jnp.where(segments_BT != 0, segment_begins(segments_BT), jnp.arange(T)), axis=0)
    oldest_T = jnp.pad(oldest_T, (0, blocks * tiling.block_T - T), mode="edge")
    first_i = jnp.min(oldest_T.reshape(blocks, -1), axis=1) // tiling.block_S
    return jnp.maximum(first_i, jnp.array(tiling.first, jnp.int32)), jnp.array(tiling.stop, jnp.int32)


def seen_bounds(tiling: Tiling, queries: Tokens, keys: Tokens, window: int | None) -> tuple[Array, Array]:
    """First key block and last + 1 of each query block, for tokens in any order: by their largest and least positions.

    Of a cache that is filled bit by bit, the empty rest costs nothing.
    """

    def ends(tokens: Tokens, block: int) -> tuple[Array, Array]:
        positions, segments = (_cut_tokens(x, block) for x in tokens)
        far = jnp.iinfo(jnp.int32).max // 2
        least, most = (jnp.where(segments != 0, positions, nothing) for nothing in (far, -far))
        return least.min((1, 2)), most.max((1, 2))

    (oldest_i, newest_i), (first_j, last_j) = ends(queries, tiling.block_T), ends(keys, tiling.block_S)
    seen_ij = first_j[None, :] <= newest_i[:, None]
    if window is not None:
        seen_ij &= last_j[None, :] > oldest_i[:, None] - window
    stop_ij = jnp.where(seen_ij, jnp.arange(1, len(first_j) + 1)[None, :], 0)
    return jnp.argmax(seen_ij, axis=1).astype(jnp.int32), jnp.max(stop_ij, axis=1).astype(jnp.int32)


def block_sizes(T: int, S: int, heads: int, *, on_cpu: bool) -> tuple[int, int]:
    """Queries and keys in a tile; `heads` counts (batch row, head) pairs, which a tile holds all of.

    On a CPU a tile's scores, fp32, should be about 1 MiB: they stay in cache, and are enough for XLA to split between
    threads (measured: 4 MiB costs a quarter more time). On an accelerator the fixed cost of a step counts more.
    """
    if not on_cpu:
        return min(512, _round_up(T)), min(512, _round_up(S))
    block_T = block_S = 64
    while heads * block_T * block_S < 2**18 and block_T < 256:
        block_T, block_S = (block_T, 2 * block_S) if block_T > block_S else (2 * block_T, block_S)
    return min(block_T, _round_up(T)), min(block_S, _round_up(S))


def _round_up(length: int) -> int:
    """To a multiple of 8: short rows need no wide tile."""
    return -(-length // 8) * 8


def visible(queries: Tokens, keys: Tokens, window: int | None) -> Array:
    """(..., T, S) of bool: which query sees which key, from positions and segments alone."""
    distance = queries.positions[..., :, None] - keys.positions[..., None, :]
    q_segments = queries.segments[..., :, None]
    seen = (q_segments == keys.segments[..., None, :]) & (q_segments != 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def chunked_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    queries: Tokens,
    keys: Tokens,
    *,
    window: int | None,
    tiling: Tiling,
    bounds: tuple[Array, Array] | None = None,
) -> Array:
    """Attention (B, T, N, H) by tiles; `queries` and `keys` are (B, T) and (B, S). Linear memory in T and S.

    `bounds` (from `part_bounds`, `segment_bounds` or `seen_bounds`) replaces the tiling's first and last key blocks by
    ones that depend on the data.
    """
    T, N, K = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[2]
    q = _cut(q_BTNH, tiling.block_T, K)
    k, v = (_cut(x, tiling.block_S, K) for x in (k_BSKH, v_BSKH))
    queries = Tokens(*(_cut_tokens(x, tiling.block_T) for x in queries))
    keys = Tokens(*(_cut_tokens(x, tiling.block_S) for x in keys))
    # one type for all: a carry of the loop must vary over the same mesh axes as what is added to it
    bounds = bounds or (jnp.array(tiling.first, jnp.int32), jnp.array(tiling.stop, jnp.int32))
    return _join(_attend(*same_variance(q, k, v, queries, keys, bounds), window), T, N)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    q_iBKRH: Array,
    k_jBKSH: Array,
    v_jBKSH: Array,
    queries: Tokens,
    keys: Tokens,
    bounds: tuple[Array, Array],
    window: int | None,
) -> Array:
    return _forward(q_iBKRH, k_jBKSH, v_jBKSH, queries, keys, bounds, window)[0]


def _forward(
    q_iBKRH: Array, k_jBKSH: Array, v_jBKSH: Array, queries: Tokens, keys: Tokens, bounds: Any, window: int | None
) -> tuple[Array, Any]:
    def query_block(_: None, block: tuple[Array, Tokens, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        q, tokens, first, stop = block

        def visit(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = state
            s = _scores(q, _at(k_jBKSH, j), tokens, Tokens(*(_at(x, j) for x in keys)), window)
            new_top = jnp.maximum(top, s.max(-1, keepdims=True))
            shrink = jnp.exp(top - new_top)
            p = jnp.exp(s - new_top)
            out = out * shrink + _einsum("BKRS,BKSH->BKRH", narrowed(p, q.dtype), _at(v_jBKSH, j))
            return out, new_top, total * shrink + p.sum(-1, keepdims=True)

        zeros = jnp.zeros_like(q, dtype=jnp.float32)
        start = zeros, jnp.full_like(zeros[..., :1], NEVER), zeros[..., :1]
        out, top, total = lax.fori_loop(first, stop, visit, start)
        # Rows without keys: output 0, and a log-sum-exp so high that their probabilities are 0 in the backward pass.
        seen = top > NEVER / 2
        total = jnp.where(seen, total, 1.0)
        out = jnp.where(seen, out / total, 0.0).astype(q.dtype)
        return None, (bits(out), jnp.where(seen, top + jnp.log(total), -NEVER))

    held, lse = (checkpoint_name(a, SAVED) for a in lax.scan(query_block, None, (q_iBKRH, queries, *bounds))[1])
    out = from_bits(held, q_iBKRH.dtype)
    return out, (q_iBKRH, k_jBKSH, v_jBKSH, queries, keys, bounds, out, lse)


def _backward(window: int | None, saved: Any, g_iBKRH: Array) -> tuple[Any, ...]:
    q_iBKRH, k_jBKSH, v_jBKSH, queries, keys, bounds, out, lse = saved
    g_RH, out_RH = (a.astype(jnp.float32).reshape(-1, a.shape[-1]) for a in (g_iBKRH, out))  # see layers.rms_norm
    delta = jnp.sum(g_RH * out_RH, -1).reshape(*out.shape[:-1], 1)

    def query_block(sums: tuple[Array, Array], block: Any) -> tuple[tuple[Array, Array], Array]:
        q, g, delta, lse, tokens, first, stop = block
        # Products over the rows take these transposes: turning the probabilities instead is what costs on a CPU.
        q_T, g_T = transposed((q, g))

        def visit(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            k, v = _at(k_jBKSH, j), _at(v_jBKSH, j)
            p = jnp.exp(_scores(q, k, tokens, Tokens(*(_at(x, j) for x in keys)), window) - lse)
            ds = narrowed(p * (_einsum("BKRH,BKSH->BKRS", g, v) - delta), q.dtype)
            dq += _einsum("BKRS,BKSH->BKRH", ds, k)
            dk = _add_at(dk, j, _einsum("BKHR,BKRS->BKHS", q_T, ds))
            return dq, dk, _add_at(dv, j, _einsum("BKHR,BKRS->BKHS", g_T, narrowed(p, g.dtype)))

        dq, dk, dv = lax.fori_loop(first, stop, visit, (jnp.zeros_like(q, dtype=jnp.float32), *sums))
        return (dk, dv), dq

    zeros = jnp.zeros_like(k_jBKSH.swapaxes(-1, -2), dtype=jnp.float32)
    xs = (q_iBKRH, g_iBKRH, delta, lse, queries, *bounds)
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), xs)
    scale = q_iBKRH.shape[-1] ** -0.5
    dk, dv = dk.swapaxes(-1, -2) * scale, dv.swapaxes(-1, -2)
    return (dq * scale).astype(q_iBKRH.dtype), dk.astype(k_jBKSH.dtype), dv.astype(v_jBKSH.dtype), None, None, None


_attend.defvjp(_forward, _backward)

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, queries: Tokens, keys: Tokens, window: int | None) -> Array:
    """Scaled and masked scores (B, K, R, S) of one tile, fp32; the mask is shared by all heads."""
    s = _einsum("BKRH,BKSH->BKRS", q, k)
    bias_BTS = quirks.barrier(quirks.REPEATS_COMPARISONS, jnp.where(visible(queries, keys, window), 0.0, NEVER))
    (B, K, R, S), T = s.shape, bias_BTS.shape[1]
    s_BKTGS = s.reshape(B, K, T, R // T, S) * q.shape[-1] ** -0.5
    return (s_BKTGS + bias_BTS[:, None, :, None, :]).reshape(s.shape)


def _at(x: Array, index: Array) -> Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _add_at(x: Array, index: Array, term: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, _at(x, index) + term, index, 0)


def _cut(x_BTNH: Array, block: int, K: int) -> Array:
    """(B, T, N, H) -> (blocks, B, K, block * G, H), T padded with zeros to whole blocks."""
    B, T, N, H = x_BTNH.shape
    n = math.ceil(T / block)
    x = jnp.pad(x_BTNH, ((0, 0), (0, n * block - T), (0, 0), (0, 0)))
    x = x.reshape(B, n, block, K, N // K, H).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(n, B, K, block * (N // K), H)


def _cut_tokens(x_BT: Array, block: int) -> Array:
    """(B, T) -> (blocks, B, block); what is added has segment 0 and sees nothing."""
    B, T = x_BT.shape
    n = math.ceil(T / block)
    return jnp.pad(x_BT, ((0, 0), (0, n * block - T))).reshape(B, n, block).swapaxes(0, 1)


def _join(x_iBKRH: Array, T: int, N: int) -> Array:
    """The inverse of `_cut`."""
    n, B, K, R, H = x_iBKRH.shape
    block = R * K // N
    x = x_iBKRH.reshape(n, B, K, block, N // K, H).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(B, n * block, N, H)[:, :T]
