"""Grouped-query attention: one function, several back-ends, one meaning (docs: NUMERICS B3, B4, B9).

out[b,t,n] = sum over s of softmax_s( q[b,t,n] . k[b,s,n//G] / sqrt(H) ) v[b,s,n//G], over the keys that t sees: of its
own segment (segment 0 is padding), at positions p - window + 1 ... p. Mixtral 2401.04088; GQA 2305.13245. The mask
comes from positions and segments, never from the order of the tokens in the row. A query that sees no key gives 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from mixtral_jax.kernels.attention_chunked import NEVER, Tokens, chunked_attention, tile, visible

Backend = Literal["auto", "reference", "chunked", "dot_product", "splash"]


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_positions_BT: Int[Array, "B T"],
    kv_positions_BS: Int[Array, "B S"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    window: int | None,
    backend: Backend = "auto",
    ordered: bool = True,
) -> Float[Array, "B T N H"]:
    """Attention of T queries to S keys, softmax in fp32, in the dtype of `q`; differentiable in q, k and v.

    Args:
        window: a query at position p sees positions p - window + 1 ... p; None: all up to p.
        backend: how it is computed; "auto" as `resolve_attention` says.
        ordered: the caller's word that T == S and that within each row the tokens of a segment stand in the order
            of their positions, so that tiles above the diagonal can be skipped. Ignored where T != S.

    Raises:
        ValueError: shapes that do not belong together, or a back-end that cannot do what is asked.
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKH, window)
    ordered = ordered and q_BTNH.shape[1] == k_BSKH.shape[1]
    queries, keys = Tokens(q_positions_BT, q_segments_BT), Tokens(kv_positions_BS, kv_segments_BS)
    if backend == "chunked":
        return chunked_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            queries,
            keys,
            window=window,
            tiling=tile(q_BTNH.shape[1], k_BSKH.shape[1], 128, 128, window=window, ordered=ordered),
        )
    return reference_attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, window=window)


def reference_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, queries: Tokens, keys: Tokens, *, window: int | None
) -> Array:
    """The formula, with the scores (B, K, T * G, S) materialised."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    # the G query heads of a kv head become rows of one matrix: larger products, no repeated keys
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * (N // K), H)
    s_BKRS = jnp.einsum("BKRH,BSKH->BKRS", q_BKRH, k_BSKH, preferred_element_type=jnp.float32)
    seen_BTS = visible(queries, keys, window)
    seen_BKRS = jnp.repeat(seen_BTS, N // K, axis=1)[:, None]
    p_BKRS = jax.nn.softmax(jnp.where(seen_BKRS, s_BKRS * H**-0.5, NEVER), axis=-1)
    # a row that sees nothing has a uniform softmax over what it must not see
    p_BKRS = jnp.where(seen_BKRS.any(-1, keepdims=True), p_BKRS, 0.0).astype(v_BSKH.dtype)
    out_BKRH = jnp.einsum("BKRS,BSKH->BKRH", p_BKRS, v_BSKH, preferred_element_type=jnp.float32)
    out = out_BKRH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    return out.astype(q_BTNH.dtype)


def _check_shapes(q: Array, k: Array, v: Array, window: int | None) -> None:
    B, _, N, H = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, H):
        raise ValueError(f"attention: queries {q.shape}, keys {k.shape} and values {v.shape} do not fit")
    if N % k.shape[2]:
        raise ValueError(f"attention: {N} query heads are not a multiple of {k.shape[2]} key/value heads")
    if window is not None and window < 1:
        raise ValueError(f"attention: sliding_window is {window}, must be at least 1 (or null for none)")
