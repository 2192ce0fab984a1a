"""Attention for NVIDIA GPUs (Ampere and newer) as a Pallas kernel of our own, by way of Triton.

FlashAttention-2 (2307.08691) with a mask that is two places a query: the keys first ... last of the row, and of those
the ones that are no padding. Segments, window and causality are all in `first` and `last`, so a tile that they empty is
not visited, forward or backward, and a part of a row (`context`) is computed like a whole one.
tokamax's kernels take such a mask too, but not for this: on an A100 its backward pass makes a T x T mask of it, on an
H100 it visits every tile before `first` (0.0.12 and 0.0.17).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mixtral_jax.kernels.attention_tiled import NEVER, SAVED, segment_begins
from mixtral_jax.parallel import same_variance, unchecked

# Queries and keys of a tile, by pass: what fits in the registers and the shared memory of an A100 at heads of 128.
FORWARD, BACKWARD_Q, BACKWARD_KV = (128, 64), (64, 32), (32, 64)
LOG2E = float(np.log2(np.e))


class Seen(NamedTuple):
    """The keys that each query sees: those from `first` to `last` that are `live`."""

    first_BT: Array
    last_BT: Array  # -1: none
    live_BS: Array


def triton_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    places_T: Array,
    *,
    window: int | None,
    interpret: bool = False,
) -> Array:
    """Causal attention within segments; the keys are a row in order, the queries its tokens at `places_T`, rising.

    T and S multiples of 128, H a power of 2. `interpret` runs on any device.
    """
    seen = seen_keys(q_segments_BT, kv_segments_BS, places_T, window)
    return _attend(interpret, *same_variance(q_BTNH, k_BSKH, v_BSKH, seen))


def seen_keys(q_segments_BT: Array, kv_segments_BS: Array, places_T: Array, window: int | None) -> Seen:
    """Of queries at these places of the row that the keys are; a padding query begins behind all keys."""
    first_BT = segment_begins(kv_segments_BS)[:, places_T]
    if window is not None:
        first_BT = jnp.maximum(first_BT, (places_T - window + 1)[None])
    real_BT, S = q_segments_BT != 0, kv_segments_BS.shape[1]
    seen = jnp.where(real_BT, first_BT, S), jnp.where(real_BT, places_T[None], -1), kv_segments_BS != 0
    return Seen(*(x.astype(jnp.int32) for x in seen))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret: bool, q: Array, k: Array, v: Array, seen: Seen) -> Array:
    return _forward(interpret, q, k, v, seen)[0]


def _forward(interpret: bool, q: Array, k: Array, v: Array, seen: Seen) -> tuple[Array, Any]:
    (B, T, N, H), (block_T, block_S) = q.shape, FORWARD
    call = pl.pallas_call(
        partial(_forward_kernel, block_S=block_S),
        grid=(T // block_T, N, B),
        in_specs=[*_specs(q, k, block_T), _rows(block_T), _rows(block_T), _whole_row(k.shape[1])],
        out_specs=[_tile(block_T, H), _statistic(block_T)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        compiler_params=triton.CompilerParams(num_warps=8 if H > 64 else 4, num_stages=2),
        interpret=interpret,
        name="attention_forward",
    )
    out, lse = (checkpoint_name(x, SAVED) for x in unchecked(call, q, k, v, *seen))
    return out, (q, k, v, seen, out, lse)


def _backward(interpret: bool, saved: Any, g: Array) -> tuple[Any, ...]:
    q, k, v, seen, out, lse = saved
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", g, out, preferred_element_type=jnp.float32)
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    options: dict[str, Any] = {
        "compiler_params": triton.CompilerParams(num_warps=4, num_stages=2),
        "interpret": interpret,
    }
    block_T, block_S = BACKWARD_Q
    vectors = [_rows(block_T), _rows(block_T), _whole_row(S)]
    statistics = [_statistic(block_T)] * 2
    call = pl.pallas_call(
        partial(_dq_kernel, block_S=block_S),
        grid=(T // block_T, N, B),
        in_specs=[*_specs(q, k, block_T), *vectors, _tile(block_T, H), *statistics],
        out_specs=_tile(block_T, H),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="attention_dq",
        **options,
    )
    dq = unchecked(call, q, k, v, *seen, g, lse, delta_BNT)
    block_T, block_S = BACKWARD_KV
    heads = pl.BlockSpec((None, T, N // K, H), lambda j, n, b: (b, 0, n, 0))
    keys, row = pl.BlockSpec((None, block_S, None, H), lambda j, n, b: (b, j, n, 0)), _whole_row(T)
    bound = pl.BlockSpec((None, None), lambda j, n, b: (b, j))
    statistics = [pl.BlockSpec((None, N // K, T), lambda j, n, b: (b, n, 0))] * 2
    call = pl.pallas_call(
        partial(_dkv_kernel, block_T=block_T),
        grid=(S // block_S, K, B),
        in_specs=[heads, keys, keys, row, row, _rows(block_S), heads, *statistics, bound, bound],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        name="attention_dkv",
        **options,
    )
    bounds = unchecked(partial(query_bounds, S=S, block_T=block_T, block_S=block_S), seen.first_BT, seen.last_BT)
    dk, dv = unchecked(call, q, k, v, *seen, g, lse, delta_BNT, *bounds)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def query_bounds(first_BT: Array, last_BT: Array, *, S: int, block_T: int, block_S: int) -> tuple[Array, Array]:
    """First query block and last + 1 that may see a key of each key block, (B, key blocks)."""
    first_Bi = first_BT.reshape(*first_BT.shape[:1], -1, block_T).min(-1)
    last_Bi = last_BT.reshape(*last_BT.shape[:1], -1, block_T).max(-1)
    begin_j = jnp.arange(0, S, block_S, dtype=jnp.int32)
    # made monotone, so that they can be searched: no block before sees as far, none behind reaches as far back
    last_Bi, first_Bi = lax.cummax(last_Bi, axis=1), lax.cummin(first_Bi, axis=1, reverse=True)

    def search(values_Bi: Array, wanted_j: Array, side: str) -> Array:
        find = partial(jnp.searchsorted, side=side, method="scan_unrolled")
        return jax.vmap(find, (0, None))(values_Bi, wanted_j).astype(jnp.int32)

    return search(last_Bi, begin_j, "left"), search(first_Bi, begin_j + block_S - 1, "right")


# ---- the kernels; refs without their batch row and head -------------------------------------------------------------


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, last_ref, live_ref, out_ref, lse_ref, *, block_S):
    q_TH, first_T, last_T = q_ref[...], first_ref[...], last_ref[...]

    def visit(j, state):
        out_TH, top_T, total_T = state
        at = pl.ds(j * block_S, block_S)
        s_TS = _scores(q_TH, k_ref[at, :], first_T, last_T, live_ref[at], j * block_S)
        new_top_T = jnp.maximum(top_T, s_TS.max(1))
        shrink_T = jnp.exp2(top_T - new_top_T)
        p_TS = jnp.exp2(s_TS - new_top_T[:, None])
        v_SH = v_ref[at, :]
        out_TH = out_TH * shrink_T[:, None] + triton.dot(p_TS.astype(v_SH.dtype), v_SH)
        return out_TH, new_top_T, total_T * shrink_T + p_TS.sum(1)

    none_T = jnp.zeros(first_T.shape, jnp.float32)
    state = jnp.zeros(q_TH.shape, jnp.float32), none_T + NEVER, none_T
    out_TH, top_T, total_T = lax.fori_loop(*key_bounds(first_T, last_T, block_S), visit, state)
    # without any key: output 0, and a log-sum-exp so high that the probabilities are 0 in the backward pass
    seen_T = top_T > NEVER / 2
    total_T = jnp.where(seen_T, total_T, 1.0)
    out_ref[...] = jnp.where(seen_T[:, None], out_TH / total_T[:, None], 0.0).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(seen_T, top_T + jnp.log2(total_T), -NEVER)


def _dq_kernel(
    q_ref, k_ref, v_ref, first_ref, last_ref, live_ref, g_ref, lse_ref, delta_ref, dq_ref, *, block_S
):  # fmt: skip
    q_TH, g_TH, first_T, last_T = q_ref[...], g_ref[...], first_ref[...], last_ref[...]
    lse_T, delta_T = lse_ref[...], delta_ref[...]

    def visit(j, dq_TH):
        at = pl.ds(j * block_S, block_S)
        k_SH = k_ref[at, :]
        p_TS = jnp.exp2(_scores(q_TH, k_SH, first_T, last_T, live_ref[at], j * block_S) - lse_T[:, None])
        ds_TS = p_TS * (triton.dot(g_TH, v_ref[at, :], trans_b=True) - delta_T[:, None])
        return dq_TH + triton.dot(ds_TS.astype(k_SH.dtype), k_SH)

    dq_TH = lax.fori_loop(*key_bounds(first_T, last_T, block_S), visit, jnp.zeros(q_TH.shape, jnp.float32))
    dq_ref[...] = (dq_TH * q_TH.shape[-1] ** -0.5).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref, k_ref, v_ref, first_ref, last_ref, live_ref, g_ref, lse_ref, delta_ref, start_ref, stop_ref, dk_ref, dv_ref,
    *, block_T,
):  # fmt: skip
    """Of one key/value head: the sum over its query heads stays in fp32."""
    k_SH, v_SH, live_S = k_ref[...], v_ref[...], live_ref[...]
    begin, start, stop = pl.program_id(0) * k_SH.shape[0], start_ref[...], stop_ref[...]
    blocks = jnp.maximum(stop - start, 0)

    def visit(step, sums):
        dk_SH, dv_SH = sums
        head, at = step // blocks, pl.ds((start + step % blocks) * block_T, block_T)
        q_TH, g_TH = q_ref[at, head, :], g_ref[at, head, :]
        s_TS = _scores(q_TH, k_SH, first_ref[at], last_ref[at], live_S, begin)
        p_TS = jnp.exp2(s_TS - lse_ref[head, at][:, None])
        ds_TS = p_TS * (triton.dot(g_TH, v_SH, trans_b=True) - delta_ref[head, at][:, None])
        dv_SH += triton.dot(p_TS.astype(g_TH.dtype), g_TH, trans_a=True)
        return dk_SH + triton.dot(ds_TS.astype(q_TH.dtype), q_TH, trans_a=True), dv_SH

    none_SH = jnp.zeros(k_SH.shape, jnp.float32)
    dk_SH, dv_SH = lax.fori_loop(0, blocks * q_ref.shape[1], visit, (none_SH, none_SH))
    dk_ref[...] = (dk_SH * k_SH.shape[-1] ** -0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv_SH.astype(dv_ref.dtype)


def _scores(q_TH: Array, k_SH: Array, first_T: Array, last_T: Array, live_S: Array, begin: Array) -> Array:
    """Scaled and masked scores of one tile, in units of base 2."""
    place_S = begin + jnp.arange(k_SH.shape[0], dtype=jnp.int32)
    seen_TS = (first_T[:, None] <= place_S[None]) & (place_S[None] <= last_T[:, None]) & (live_S != 0)[None]
    s_TS = triton.dot(q_TH, k_SH, trans_b=True) * (q_TH.shape[-1] ** -0.5 * LOG2E)
    return jnp.where(seen_TS, s_TS, NEVER)


def key_bounds(first_T: Array, last_T: Array, block_S: int) -> tuple[Array, Array]:
    """First key block and last + 1 that a block of queries visits."""
    return first_T.min() // block_S, (last_T.max() + block_S) // block_S


# ---- what of each array a program sees; the grid is (blocks, heads, batch rows) -------------------------------------


def _tile(block: int, H: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block, None, H), lambda i, n, b: (b, i, n, 0))


def _specs(q: Array, k: Array, block_T: int) -> list[pl.BlockSpec]:
    """Queries, keys, values: a tile, and the whole row of its head."""
    group, (S, _, H) = q.shape[2] // k.shape[2], k.shape[1:]
    whole = pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, n // group, 0))
    return [_tile(block_T, H), whole, whole]


def _rows(block: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block), lambda i, n, b: (b, i))


def _whole_row(length: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, length), lambda i, n, b: (b, 0))


def _statistic(block: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, block), lambda i, n, b: (b, n, i))
