"""Attention in tiles, with its own derivative: the T x S score matrix never exists as a whole.

softmax(q k^T / sqrt(H)) v over one tile of queries and keys at a time, with a running maximum and a running sum
(FlashAttention, arXiv 2205.14135, algorithm 1); only the output and log-sum-exp of each row are saved, and the backward
pass computes each tile's probabilities again. The tiles to visit are a static list, so tiles that the mask empties
are not visited at all: their cost is gone from the loop, not masked away.

Layout: the G query heads of a kv head are rows of one matrix, R = block_T * G, so that one product serves them all.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

NEVER = -1e30  # a score that no key reaches: finite, so that rows without any key give no NaN


class Tiling(NamedTuple):
    """How T queries and S keys are cut, and which tiles can hold anything. Static, hashable."""

    block_T: int
    block_S: int
    pairs: tuple[tuple[int, int], ...]


class Tokens(NamedTuple):
    """Position and segment of each token, cut in blocks: (blocks, B, block)."""

    positions: Array
    segments: Array


def tile(T: int, S: int, block_T: int, block_S: int, *, window: int | None, ordered: bool) -> Tiling:
    """The tiles that attention must visit: all of them, or with `ordered` those on and below the diagonal.

    Within a segment of an ordered row, positions grow at least as fast as indices: a key of a higher index, or one
    that is `window` or more indices behind, is never seen.
    """
    pairs = []
    for i in range(math.ceil(T / block_T)):
        first, last = i * block_T, min((i + 1) * block_T, T) - 1
        for j in range(math.ceil(S / block_S)):
            key_first, key_last = j * block_S, (j + 1) * block_S - 1
            too_late = ordered and key_first > last
            too_old = ordered and window is not None and first - key_last >= window
            if not (too_late or too_old):
                pairs.append((i, j))
    return Tiling(block_T, block_S, tuple(pairs))


def visible(queries: Tokens, keys: Tokens, window: int | None) -> Array:
    """(..., T, S) of bool: which query sees which key (NUMERICS B4), from positions and segments alone."""
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
) -> Array:
    """Attention (B, T, N, H) by tiles; `queries` and `keys` are (B, T) and (B, S). Linear memory in T and S."""
    T, N, K = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[2]
    q = _cut(q_BTNH, tiling.block_T, K)
    k, v = (_cut(x, tiling.block_S, K) for x in (k_BSKH, v_BSKH))
    queries = Tokens(*(_cut_tokens(x, tiling.block_T) for x in queries))
    keys = Tokens(*(_cut_tokens(x, tiling.block_S) for x in keys))
    # one type for all: a carry of the loop must vary over the same mesh axes as what is added to it
    q, k, v, queries, keys = _vary_alike((q, k, v, queries, keys))
    return _join(_attend(q, k, v, queries, keys, window, tiling), T, N)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q_iBKRH: Array,
    k_jBKSH: Array,
    v_jBKSH: Array,
    queries: Tokens,
    keys: Tokens,
    window: int | None,
    tiling: Tiling,
) -> Array:
    return _forward(q_iBKRH, k_jBKSH, v_jBKSH, queries, keys, window, tiling)[0]


def _forward(
    q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, window: int | None, tiling: Tiling
) -> tuple[Array, Any]:
    def visit(state: tuple[Array, Array, Array], i: Any, j: Any) -> tuple[Array, Array, Array]:
        out, top, total = state
        s = _scores(q, k, queries, keys, i, j, window)
        m_old = top[i]
        m = jnp.maximum(m_old, s.max(-1, keepdims=True))
        p = jnp.exp(s - m)
        shrink = jnp.exp(m_old - m)
        o = jnp.einsum("BKRS,BKSH->BKRH", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
        return (
            out.at[i].set(out[i] * shrink + o),
            top.at[i].set(m),
            total.at[i].set(total[i] * shrink + p.sum(-1, keepdims=True)),
        )

    zeros = _zeros_like(q)
    top = jnp.full_like(zeros[..., :1], NEVER)
    out, top, total = _each_pair(visit, (zeros, top, zeros[..., :1]), tiling)
    seen = top > NEVER / 2
    # rows without keys: output 0, and a log-sum-exp so high that their probabilities are 0 in the backward pass
    out = jnp.where(seen, out / jnp.where(seen, total, 1.0), 0.0).astype(q.dtype)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -NEVER)
    return out, (q, k, v, queries, keys, out, lse)


def _backward(window: int | None, tiling: Tiling, saved: Any, g: Array) -> tuple[Any, ...]:
    q, k, v, queries, keys, out, lse = saved
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    # The products over rows take these transposes: turning the probabilities themselves is what costs on a CPU.
    q_T, g_T = lax.optimization_barrier((q.swapaxes(-1, -2), g.swapaxes(-1, -2)))
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(state: tuple[Array, Array, Array], i: Any, j: Any) -> tuple[Array, Array, Array]:
        dq, dk, dv = state
        p = jnp.exp(_scores(q, k, queries, keys, i, j, window) - lse[i])
        dp = einsum("BKRH,BKSH->BKRS", g[i], v[j])
        ds = (p * (dp - delta[i])).astype(q.dtype)
        return (
            dq.at[i].add(einsum("BKRS,BKSH->BKRH", ds, k[j])),
            dk.at[j].add(einsum("BKHR,BKRS->BKHS", q_T[i], ds)),
            dv.at[j].add(einsum("BKHR,BKRS->BKHS", g_T[i], p.astype(g.dtype))),
        )

    start = (_zeros_like(q), _zeros_like(k.swapaxes(-1, -2)), _zeros_like(v.swapaxes(-1, -2)))
    dq, dk, dv = _each_pair(visit, start, tiling)
    scale = q.shape[-1] ** -0.5
    dk, dv = dk.swapaxes(-1, -2), dv.swapaxes(-1, -2)
    return (dq * scale).astype(q.dtype), (dk * scale).astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, queries: Tokens, keys: Tokens, i: Any, j: Any, window: int | None) -> Array:
    """Scaled and masked scores (B, K, R, S) of one tile, fp32; the mask is shared by all heads."""
    s = jnp.einsum("BKRH,BKSH->BKRS", q[i], k[j], preferred_element_type=jnp.float32)
    seen = visible(Tokens(*(x[i] for x in queries)), Tokens(*(x[j] for x in keys)), window)
    bias_BTS = jnp.where(seen, 0.0, NEVER)
    (B, K, R, S), T = s.shape, bias_BTS.shape[1]
    s_BKTGS = s.reshape(B, K, T, R // T, S) * q.shape[-1] ** -0.5
    return (s_BKTGS + bias_BTS[:, None, :, None, :]).reshape(s.shape)


# With few tiles, straight-line code lets XLA drop the loop's bookkeeping; with many, it must not grow.
_UNROLL = 12


def _each_pair(visit: Callable[..., Any], state: Any, tiling: Tiling) -> Any:
    """Visit every tile in order."""
    if len(tiling.pairs) <= _UNROLL:
        for i, j in tiling.pairs:
            state = visit(state, i, j)
        return state
    pairs = jnp.asarray(np.array(tiling.pairs, np.int32))
    return lax.scan(lambda state, pair: (visit(state, pair[0], pair[1]), None), state, pairs)[0]


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


def _zeros_like(x: Array) -> Array:
    return jnp.zeros_like(x, dtype=jnp.float32)


def _vary_alike(tree: Any) -> Any:
    """Every leaf typed as varying over all manual mesh axes that any leaf varies over (shard_map, check_vma)."""
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))

    def cast(x: Array) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, tree)
