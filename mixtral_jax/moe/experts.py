"""The experts: SwiGLU feed-forward networks over rows sorted by expert."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels import (
    Low,
    blocked_swiglu,
    choose_matmul,
    grouped_down,
    grouped_matmul,
    linear,
    saved,
    swiglu,
)
from mixtral_jax.lora import LowRank, grouped_low_rank, low_rank
from mixtral_jax.parallel import machine


class ExpertWeights(NamedTuple):
    """The matrices of this device's experts, gathered, with their adapters."""

    w13_ED2F: Float[Array, "E D *twoF"]  # (2, F), w1 then w3, or joined to 2F
    w2_EFD: Float[Array, "E F D"]
    adapters: Mapping[str, LowRank] = {}  # of some of w1, w3, w2


def in_blocks(backend: str, adapters: Mapping[str, LowRank]) -> bool:
    """Whether the whole feed-forward is one function, which takes w13 and w2 in a wider dtype than x's too."""
    return choose_matmul(backend, machine()).kernel == "blocked" and not any(a.drops for a in adapters.values())


def grouped_swiglu(
    x_RD: Float[Array, "R D"],
    gate_R: Float[Array, " R"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    backend: str,
) -> Float[Array, "R D"]:
    """w2( gate * silu(w1 x) * w3 x ) with the matrices of each row's expert; rows behind the last are undefined."""
    x_RD, gate_R = (saved(a, "expert_input") for a in (x_RD, gate_R))
    if in_blocks(backend, weights.adapters):
        low = _factors(weights.adapters)
        return blocked_swiglu(x_RD, gate_R, weights.w13_ED2F, weights.w2_EFD, group_sizes_E, *low)
    kernel = choose_matmul(backend, machine()).kernel
    if kernel != "dense" and not weights.adapters:
        h_R2F = saved(grouped_matmul(x_RD, weights.w13_ED2F, group_sizes_E, backend=kernel), "expert_hidden")
        return grouped_down(h_R2F, gate_R, weights.w2_EFD, group_sizes_E, backend=kernel)
    inside_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(group_sizes_E))[:, None]
    return _feed_forward(
        x_RD,
        gate_R,
        weights,
        lambda x, w: grouped_matmul(x, w, group_sizes_E, backend=backend),
        lambda x, adapter: grouped_low_rank(x, adapter, group_sizes_E, backend),
        inside_R1,
    )


def _factors(adapters: Mapping[str, LowRank]) -> tuple[Low | None, Low | None]:
    """Those of w1 and w3 side by side, as factors of w13, and those of w2; the scale within B."""
    scaled = {name: Low(adapter.a, adapter.b * adapter.scale) for name, adapter in adapters.items()}
    halves = []
    for name, before, behind in (("w1", 0, 1), ("w3", 1, 0)):
        if name in scaled:
            a_EDr, b_ErF = scaled[name]
            F = b_ErF.shape[-1]  # w1 adds to the first half of h only, w3 to the second
            halves.append((a_EDr, jnp.pad(b_ErF, ((0, 0), (0, 0), (before * F, behind * F)))))
    if not halves:
        return None, scaled.get("w2")
    a, b = zip(*halves, strict=True)
    return Low(jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=1)), scaled.get("w2")


def dense_swiglu(x_MD: Float[Array, "M D"], weights: ExpertWeights) -> Float[Array, "M D"]:
    """The one expert of a dense model."""
    return _feed_forward(
        x_MD,
        None,
        weights,
        lambda x, w: linear(x[None], w[0].reshape(w.shape[1], -1))[0],
        lambda x, adapter: low_rank(x, replace(adapter, a=adapter.a[0], b=adapter.b[0])),
    )


def _feed_forward(
    x: jax.Array,
    gate: jax.Array | None,
    weights: ExpertWeights,
    matmul: Callable[[jax.Array, jax.Array], jax.Array],
    low_rank: Callable[[jax.Array, LowRank], jax.Array],
    inside_R1: jax.Array | None = None,
) -> jax.Array:
    def adapted(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
        adapter = weights.adapters.get(name)
        return y if adapter is None else y + low_rank(x, adapter)

    h_R2F = matmul(x, weights.w13_ED2F)
    if weights.adapters.keys() & {"w1", "w3"}:
        h1_RF, h3_RF = jnp.split(h_R2F, 2, axis=-1)
        h_R2F = jnp.concatenate([adapted("w1", x, h1_RF), adapted("w3", x, h3_RF)], axis=-1)
    h_R2F = saved(h_R2F, "expert_hidden")

    @partial(jax.checkpoint, prevent_cse=False)  # of the activation nothing is kept but h
    def down(h_R2F: jax.Array, gate: jax.Array | None, w2_EFD: jax.Array) -> jax.Array:
        a_RF = swiglu(h_R2F, gate, inside_R1)
        return adapted("w2", a_RF, matmul(a_RF, w2_EFD))

    return down(h_R2F, gate, weights.w2_EFD)
