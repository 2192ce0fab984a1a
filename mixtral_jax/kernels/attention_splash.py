"""Attention by JAX's splash kernel for TPU (jax.experimental.pallas.ops.tpu.splash_attention).

Its mask is one of indices, so the tokens must stand in order; segments are data. Pallas kernels are opaque to the
partitioner and do not say along which mesh axes their results vary: they are called on one device's shards, inside a
shard_map, and under check_vma they need the wrapper and the custom_vjp below (the kernel's own does not pass).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

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
from jax.sharding import PartitionSpec as P

from mixtral_jax.kernels.attention_chunked import SAVED
from mixtral_jax.sharding import alike, variance, varying

LANES = 128  # the kernel's tiles: T and H must be multiples


def splash_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, *, window: int | None, interpret: bool = False
) -> Array:
    """Causal attention within segments for ordered rows; T and H multiples of 128. `interpret` runs on any device."""
    q, k, v, segments = alike(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    out_BTNH = _attend(q, k, v, segments, window, interpret)
    # the kernel lets padding see padding
    return jnp.where((segments != 0)[:, :, None, None], out_BTNH, 0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, segments: Array, window: int | None, interpret: bool) -> Array:
    return _forward(q, k, v, segments, window, interpret)[0]


def _forward(q: Array, k: Array, v: Array, segments: Array, window: int | None, interpret: bool) -> tuple[Array, Any]:
    T, N, H = q.shape[1:]
    kernel = _kernel(T, N, window, interpret)
    # the kernel knows no scale, and wants heads before tokens
    q, k, v = ((x * scale).swapaxes(1, 2) for x, scale in ((q, H**-0.5), (k, 1), (v, 1)))

    def run(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Array]:
        out, (lse,) = jax.vmap(kernel)(q, k, v, SegmentIds(segments, segments))
        return out, lse

    out_BNTH, lse_BNT = (checkpoint_name(x, SAVED) for x in _unchecked(run, q, k, v, segments))
    return out_BNTH.swapaxes(1, 2), (q, k, v, segments, out_BNTH, lse_BNT)


def _backward(window: int | None, interpret: bool, saved: tuple[Array, ...], g_BTNH: Array) -> tuple[Any, ...]:
    N, T, H = saved[0].shape[1:]
    kernel = _kernel(T, N, window, interpret)
    options = [kernel.kwargs[name] for name in _BACKWARD_OPTIONS]

    def run_row(q: Array, k: Array, v: Array, segments: Array, out: Array, lse: Array, g: Array) -> tuple[Array, ...]:
        ids = SegmentIds(segments, segments)
        residuals = (q, k, v, ids, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        return _kernel_backward(*options, residuals, g)[3:6]

    dq, dk, dv = _unchecked(jax.vmap(run_row), *saved, g_BTNH.swapaxes(1, 2))
    return (dq * H**-0.5).swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2), None


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


def _kernel(T: int, N: int, window: int | None, interpret: bool) -> SplashAttentionKernel:
    mask = CausalMask((T, T)) if window is None else LocalMask((T, T), (window - 1, 0), 0)
    block = next(b for b in (512, 384, 256, LANES) if T % b == 0)
    return make_splash_mha(
        mask=MultiHeadMask([mask] * N),
        block_sizes=BlockSizes(*(block,) * 8),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=interpret,
    )


def _unchecked(run: Callable[..., Any], *args: Any) -> Any:
    """run(*args) without the check of variance, its results then typed as varying like the arguments."""
    axes = tuple(sorted(frozenset[str]().union(*map(variance, jax.tree.leaves(args)))))
    if not axes:
        return run(*args)
    out = jax.shard_map(run, in_specs=P(), out_specs=P(), axis_names=set(), check_vma=False)(*args)
    return jax.tree.map(lambda x: varying(x, axes), out)
