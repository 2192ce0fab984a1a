"""Attention by JAX's splash kernel for TPU (jax.experimental.pallas.ops.tpu.splash_attention).

Its mask is one of indices, so the tokens must stand in order; segments are data. Pallas kernels are opaque to the
partitioner and do not say along which mesh axes their results vary: they are called on one device's shards, inside a
shard_map, and under check_vma they need the wrapper and the custom_vjp below (the kernel's own does not pass).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
    splash_attention_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

from mixtral_jax.kernels.attention_tiled import SAVED
from mixtral_jax.parallel import Part, same_variance, unchecked, variance, varying, zigzag

SMALLEST_BLOCK = 128  # T must be a multiple


def splash_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    *,
    window: int | None,
    part: Part | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention within segments for ordered rows; T, S and H multiples of 128.

    `part`: the queries are only this zig-zag part of the row that the keys are; else both are the whole row.
    `interpret` runs on any device.
    """
    count, index = (1, jnp.zeros((), jnp.int32)) if part is None else (part.parts, part.own)
    inputs = same_variance(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, index)
    out_BTNH = _attend(_Static(window, count, interpret), *inputs)
    # the kernel lets padding see padding
    return jnp.where((q_segments_BT != 0)[:, :, None, None], out_BTNH, 0)


class _Static(NamedTuple):
    """What the kernel is made for, beside its shapes."""

    window: int | None
    parts: int  # of a row
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    static: _Static, q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, index: Array
) -> Array:
    return _forward(static, q, k, v, q_segments, kv_segments, index)[0]


def _forward(
    static: _Static, q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, index: Array
) -> tuple[Array, Any]:
    (N, H), S = q.shape[2:], k.shape[1]
    kernel = _kernel(S, N, static)
    # the kernel knows no scale, and wants heads before tokens
    q, k, v = ((x * scale).swapaxes(1, 2) for x, scale in ((q, H**-0.5), (k, 1), (v, 1)))
    ids, masks = SegmentIds(q_segments, kv_segments), _masks(kernel, index, static.parts)

    def run(masks: Any, q: Array, k: Array, v: Array, ids: SegmentIds) -> tuple[Array, Array]:
        own = SplashAttentionKernel(*masks, **kernel.kwargs)
        out, (lse,) = jax.vmap(own)(q, k, v, ids)
        return out, lse

    out_BNTH, lse_BNT = (checkpoint_name(x, SAVED) for x in unchecked(run, masks, q, k, v, ids))
    return out_BNTH.swapaxes(1, 2), (q, k, v, ids, out_BNTH, lse_BNT, index)


def _backward(static: _Static, saved: Any, g_BTNH: Array) -> tuple[Any, ...]:
    *saved, index = saved
    (N, _, H), S = saved[0].shape[1:], saved[1].shape[2]
    kernel = _kernel(S, N, static)
    options = [kernel.kwargs[name] for name in _BACKWARD_OPTIONS]

    def run(masks: Any, *rows: Any) -> tuple[Array, ...]:
        def one(q: Array, k: Array, v: Array, ids: SegmentIds, out: Array, lse: Array, g: Array) -> tuple[Array, ...]:
            return _kernel_backward(*options, (q, k, v, ids, None, out, lse, *masks[1:]), g)[3:6]

        return jax.vmap(one)(*rows)

    dq, dk, dv = unchecked(run, _masks(kernel, index, static.parts), *saved, g_BTNH.swapaxes(1, 2))
    return (dq * H**-0.5).swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2), None, None, None


_attend.defvjp(_forward, _backward)

# The kernel's backward pass has no public name of its own. These are its first arguments, in order.
_kernel_backward: Callable[..., tuple[Any, ...]] = splash_attention_kernel._splash_attention_bwd
_BACKWARD_OPTIONS = (
    "save_residuals",
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
    "attn_logits_soft_cap",
    "interpret",
)


def _kernel(S: int, N: int, static: _Static) -> SplashAttentionKernel:
    """The kernel for a row of S tokens, its queries in zig-zag order in `count` parts."""
    window, count, interpret = static
    mask = CausalMask((S, S)) if window is None else LocalMask((S, S), (window - 1, 0), 0)
    piece = S
    if count > 1:
        mask.q_sequence = zigzag(S, count).astype(mask.q_sequence.dtype)
        piece = S // (2 * count)
    block = next(b for b in (512, 384, 256, SMALLEST_BLOCK) if piece % b == 0)
    return make_splash_mha(
        mask=MultiHeadMask([mask] * N),
        block_sizes=BlockSizes(*(block,) * 8),
        head_shards=1,
        q_seq_shards=count,
        save_residuals=True,
        interpret=interpret,
    )


def _masks(kernel: SplashAttentionKernel, index: Array, count: int) -> list[Any]:
    """What the kernel's three passes know of the mask; of the queries of part `index` only."""
    infos: list[Any] = [kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info]
    if count == 1:
        return infos

    def own(x: Array | None, axis: int) -> Array | None:
        if x is None:
            return None
        size = x.shape[axis] // count
        return jax.lax.dynamic_slice_in_dim(varying(x, sorted(variance(index))), index * size, size, axis)

    by_block = ("data_next", "mask_next", "block_mask")  # (heads, query blocks, key blocks)
    return [
        info._replace(**{n: own(getattr(info, n), 1) for n in by_block}, q_sequence=own(info.q_sequence, 0))
        for info in infos
    ]
