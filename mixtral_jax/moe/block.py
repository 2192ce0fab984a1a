"""The sparse feed-forward block: route -> dispatch -> grouped matmuls -> combine -> statistics."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mixtral_jax.config import MixtralConfig, MoeConfig
from mixtral_jax.moe.dispatch import limit_capacity
from mixtral_jax.moe.experts import dense_swiglu, grouped_swiglu
from mixtral_jax.moe.losses import RouterStats, router_stats
from mixtral_jax.moe.parallel import exchange_experts
from mixtral_jax.moe.router import route
from mixtral_jax.sharding import TOKEN_AXES, gather, psum


class SparseMoe(nnx.Module):
    """Top-k of E SwiGLU experts (Mixtral 2401.04088, section 2); with one expert, a dense SwiGLU."""

    def __init__(
        self,
        config: MixtralConfig,
        options: MoeConfig,
        *,
        key: jax.Array,
        stack: tuple[int, ...] = (),
        dtype: jnp.dtype,
    ):
        self.config, self.options = config, options
        e, d, f = config.num_local_experts, config.hidden_size, config.intermediate_size
        names = ("layers",) * len(stack)

        def weight(index: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            value = jax.random.normal(jax.random.fold_in(key, index), stack + shape, dtype)
            return nnx.Param(config.initializer_range * value, axes=names + axes)

        if not config.is_dense:
            self.router = weight(0, (d, e), ("embed", "router_experts"))
        self.w13 = weight(1, (e, d, 2, f), ("experts", "expert_embed", "gate_up", "ffn"))
        self.w2 = weight(2, (e, f, d), ("experts", "ffn", "expert_embed"))

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The block's output, and its router statistics over the tokens of all devices."""
        x_MD, valid_M = x_BTD.reshape(-1, x_BTD.shape[-1]), valid_BT.reshape(-1)
        w13, w2 = gather(self.w13, x_BTD.dtype), gather(self.w2, x_BTD.dtype)
        if self.config.is_dense:
            out_MD, stats = dense_swiglu(x_MD, w13[0], w2[0]), _dense_stats(valid_M)
        else:
            router_DE = gather(self.router, jnp.float32)
            out_MD, stats = self._sparse(x_MD, valid_M, router_DE, w13, w2)
        return psum(out_MD, ("tensor",)).astype(x_BTD.dtype).reshape(x_BTD.shape), stats

    def _sparse(self, x_MD, valid_M, router_DE, w13, w2) -> tuple[jax.Array, RouterStats]:
        experts, top_k, options = self.config.num_local_experts, self.config.num_experts_per_tok, self.options
        dtype = jnp.float32 if options.router_dtype == "float32" else x_MD.dtype
        routing = route(x_MD, router_DE, top_k, dtype)
        # Padding goes to an expert that nobody has: never sent, never computed, never counted.
        expert_MC = jnp.where(valid_M[:, None], routing.expert_MC, experts)
        capacity, dropped = None, jnp.zeros((), jnp.float32)
        if options.capacity_factor is not None:
            capacity = min(x_MD.shape[0], math.ceil(options.capacity_factor * x_MD.shape[0] * top_k / experts))
            kept_MC = limit_capacity(expert_MC, experts, capacity)
            dropped = jnp.sum(kept_MC != expert_MC, dtype=jnp.float32)
            expert_MC = kept_MC
        stats = router_stats(routing, valid_M.astype(jnp.float32), dropped)

        def block(x_MD, expert_MC, gate_MC, w13, w2):
            return exchange_experts(
                x_MD, expert_MC, gate_MC, lambda x, sizes: grouped_swiglu(x, w13, w2, sizes, options.matmul),
                experts=experts, transport=options.transport, capacity=capacity,
            )  # fmt: skip

        chunk = options.chunk_tokens
        if chunk is None or chunk >= x_MD.shape[0]:
            return block(x_MD, expert_MC, routing.gate_MC, w13, w2), stats
        return _in_chunks(block, chunk, x_MD, expert_MC, routing.gate_MC, w13, w2), stats


def _in_chunks(block, chunk: int, x_MD, expert_MC, gate_MC, w13, w2) -> jax.Array:
    """The block on `chunk` tokens at a time; only inputs are kept for the backward pass."""
    if x_MD.shape[0] % chunk:
        raise ValueError(f"moe.chunk_tokens ({chunk}) does not divide the {x_MD.shape[0]} tokens of one device")
    parts = [a.reshape(-1, chunk, a.shape[1]) for a in (x_MD, expert_MC, gate_MC)]
    run = jax.checkpoint(block)
    return jax.lax.map(lambda p: run(*p, w13, w2), tuple(parts)).reshape(x_MD.shape)


def _dense_stats(valid_M: Bool[Array, " M"]) -> RouterStats:
    tokens = psum(jnp.sum(valid_M, dtype=jnp.float32), TOKEN_AXES)
    none = jnp.zeros_like(tokens)
    return RouterStats(tokens[None], tokens[None], none, none, none, tokens)
