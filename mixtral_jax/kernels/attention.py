"""Grouped-query attention: one function, several back-ends, one meaning.

out[b,t,n] = sum over s of softmax_s(q[b,t,n] . k[b,s,n//G] / sqrt(H)) v[b,s,n//G], over the keys s that t sees: those
of its own segment (segment 0 is padding) at positions p - window + 1 ... p. Mixtral 2401.04088; GQA 2305.13245. The
mask is made of positions and segments, never of places in the row. A query that sees no key gives 0.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mixtral_jax.kernels.attention_tiled import (
    NEVER,
    SAVED,
    Tokens,
    block_sizes,
    chunked_attention,
    part_bounds,
    seen_bounds,
    segment_bounds,
    tile,
    visible,
)
from mixtral_jax.kernels.choice import AttentionShape, Backend, choose_attention
from mixtral_jax.kernels.products import saved
from mixtral_jax.parallel import Part, machine, places, platform


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    queries: Tokens,
    keys: Tokens,
    window: int | None,
    backend: Backend = "auto",
    ordered: bool = True,
    part: Part | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T queries to S keys, softmax in fp32, result in the dtype of `q`; differentiable in q, k and v.

    What its backward pass needs carries the name "attended" for rematerialisation policies.

    Args:
        queries: position and segment of the T queries, (B, T).
        keys: the same of the S keys, (B, S).
        window: a query at position p sees positions p - window + 1 ... p; None: all up to p.
        backend: how it is computed; "auto" as `choose_attention` says.
        ordered: the caller's word that queries and keys are the same tokens and that each segment is a run of
            neighbours with positions that go up by one: tiles off the band are skipped. Not believed where T != S.
        part: the caller's word that the keys are an ordered row, and the queries this zig-zag part of it.

    Raises:
        ValueError: shapes that do not belong together, or a back-end that cannot do what is asked.
    """
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    _check(q_BTNH, k_BSKH, v_BSKH, window)
    ordered = ordered and T == S
    run = T if part is None else T // 2  # tokens that are neighbours in the row
    dtype, in_order = q_BTNH.dtype.name, ordered or part is not None
    shape = AttentionShape(run, S, H, dtype, in_order, part is not None, q_BTNH.size)
    chosen = choose_attention(backend, machine(), shape).kernel
    # imported here: Pallas takes a second to load, and each is for one kind of machine
    if chosen == "splash":
        from mixtral_jax.kernels.attention_splash import splash_attention

        return splash_attention(q_BTNH, k_BSKH, v_BSKH, queries.segments, keys.segments, window=window, part=part)
    if chosen == "cudnn":
        from mixtral_jax.kernels.attention_cudnn import cudnn_attention

        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, queries.segments, window=window)
    if chosen == "triton":
        from mixtral_jax.kernels.attention_triton import triton_attention

        stand = jnp.arange(T, dtype=jnp.int32) if part is None else places(part, T)
        return triton_attention(q_BTNH, k_BSKH, v_BSKH, queries.segments, keys.segments, stand, window=window)
    if chosen == "chunked":
        blocks = block_sizes(T, S, B * N, on_cpu=platform() == "cpu")
        tiling = tile(T, S, *blocks, window=window, ordered=ordered)
        if part is not None:
            bounds = part_bounds(tiling, places(part, T), window)
        else:
            bounds = segment_bounds(tiling, queries.segments) if ordered else seen_bounds(tiling, queries, keys, window)
        return chunked_attention(q_BTNH, k_BSKH, v_BSKH, queries, keys, window=window, tiling=tiling, bounds=bounds)
    compute = {"reference": reference_attention, "dot_product": dot_product_attention}[chosen]
    return saved(compute(q_BTNH, k_BSKH, v_BSKH, visible(queries, keys, window)), SAVED)


def reference_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, seen_BTS: Array) -> Array:
    """The formula as it stands, all scores (B, K, T * G, S) in memory at once."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    # the G query heads of a kv head become rows of one matrix: larger products, no repeated keys
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * (N // K), H)
    s_BKRS = jnp.einsum("BKRH,BSKH->BKRS", q_BKRH, k_BSKH, preferred_element_type=jnp.float32)
    seen_BKRS = jnp.repeat(seen_BTS, N // K, axis=1)[:, None]
    p_BKRS = jax.nn.softmax(jnp.where(seen_BKRS, s_BKRS * H**-0.5, NEVER), axis=-1)
    # a row that sees nothing has a uniform softmax over what it must not see
    p_BKRS = jnp.where(seen_BKRS.any(-1, keepdims=True), p_BKRS, 0.0).astype(v_BSKH.dtype)
    out_BKRH = jnp.einsum("BKRS,BSKH->BKRH", p_BKRS, v_BSKH, preferred_element_type=jnp.float32)
    out_BTNH = out_BKRH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    return out_BTNH.astype(q_BTNH.dtype)


def dot_product_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, seen_BTS: Array) -> Array:
    """`jax.nn.dot_product_attention` as XLA computes it, all scores at once."""
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=seen_BTS[:, None], implementation="xla")
    return jnp.where(seen_BTS.any(-1)[:, :, None, None], out_BTNH, 0)


def _check(q: Array, k: Array, v: Array, window: int | None) -> None:
    B, _, N, H = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, H):
        raise ValueError(f"attention: queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together")
    if N % k.shape[2]:
        raise ValueError(f"attention: {N} query heads are not a multiple of {k.shape[2]} key/value heads")
    if window is not None and window < 1:
        raise ValueError(f"attention: sliding_window is {window}; it must be at least 1, or null for none")
