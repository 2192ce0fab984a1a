"""The sparse feed-forward block: route -> dispatch -> grouped matmuls -> combine -> statistics."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mixtral_jax.config import MixtralConfig, MoeConfig
from mixtral_jax.lora import Adapter, LoraConfig, base_weight
from mixtral_jax.moe.balance import RouterStats, router_stats
from mixtral_jax.moe.dispatch import limit_capacity
from mixtral_jax.moe.experts import ExpertWeights, dense_swiglu, grouped_swiglu
from mixtral_jax.moe.router import route
from mixtral_jax.moe.transport import exchange_experts
from mixtral_jax.parallel.sharding import TOKEN_AXES, gather, psum
from mixtral_jax.quantize import whole_weight


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
        lora: LoraConfig | None = None,
    ):
        self.config, self.options = config, options
        layers = {"layers": stack[0]} if stack else {}
        experts = {**layers, "experts": config.num_local_experts}
        hidden, ffn = {"expert_embed": config.hidden_size}, {"ffn": config.intermediate_size}
        routes = {"embed": config.hidden_size, "router_experts": config.num_local_experts}

        def value(index: int, shape: dict[str, int]) -> jax.Array:
            normal = jax.random.normal(jax.random.fold_in(key, index), tuple(shape.values()), dtype)
            return config.initializer_range * normal

        if not config.is_dense:
            self.router = nnx.Param(value(0, {**layers, **routes}), axes=tuple({**layers, **routes}))
        w13, w2 = {**experts, **hidden, "gate_up": 2, **ffn}, {**experts, **ffn, **hidden}
        self.w13 = base_weight(value(1, w13), w13, "expert_embed", lora)
        self.w2 = base_weight(value(2, w2), w2, "ffn", lora)
        matrices = {"w1": (hidden, ffn), "w3": (hidden, ffn), "w2": (ffn, hidden)}
        for index, (name, (inputs, outputs)) in enumerate(matrices.items(), start=3):
            if lora is not None and lora.adapts(f"moe.{name}"):
                own_key = jax.random.fold_in(key, index)
                setattr(self, f"{name}_lora", Adapter(lora, inputs, outputs, key=own_key, stack=experts, dtype=dtype))

    def weights(self, dtype: jnp.dtype, key: jax.Array | None = None) -> ExpertWeights:
        """The matrices of all experts, gathered, in the compute dtype. `key`: of adapter dropout."""
        adapters = {}
        for index, name in enumerate(("w1", "w3", "w2")):
            adapter = getattr(self, f"{name}_lora", None)
            if adapter is not None:
                own_key = None if key is None else jax.random.fold_in(key, 100 + index)
                adapters[name] = adapter.ready(dtype, own_key)
        return ExpertWeights(whole_weight(self.w13, dtype), whole_weight(self.w2, dtype), adapters)

    def one_expert(self, layer: jax.Array, expert: jax.Array, dtype: jnp.dtype) -> ExpertWeights:
        """Of a stack of layers on one device: the matrices of one expert of one layer, as a stack of one.

        They are sliced out of the stack at once: a slice of a whole layer would be copied first.
        """

        def part(path: Any, p: jax.Array) -> jax.Array:
            if path[0].key == "router":
                return p
            box = jax.lax.dynamic_slice(p, (layer, expert, *(0,) * (p.ndim - 2)), (1, 1, *p.shape[2:]))
            return box[0]

        graphdef, state = nnx.split(self)
        sliced = jax.tree_util.tree_map_with_path(part, nnx.to_pure_dict(state))
        return nnx.merge(graphdef, sliced).weights(dtype)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], key: jax.Array | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """The block's output, and its router statistics over the tokens of all devices. `key`: of adapter dropout."""
        x_MD, valid_M = x_BTD.reshape(-1, x_BTD.shape[-1]), valid_BT.reshape(-1)
        weights = self.weights(x_BTD.dtype, key)
        if self.config.is_dense:
            out_MD, stats = dense_swiglu(x_MD, weights), _dense_stats(valid_M)
        else:
            out_MD, stats = self._sparse(x_MD, valid_M, gather(self.router, jnp.float32), weights)
        return psum(out_MD, ("tensor",)).astype(x_BTD.dtype).reshape(x_BTD.shape), stats

    def _sparse(
        self, x_MD: jax.Array, valid_M: jax.Array, router_DE: jax.Array, weights: ExpertWeights
    ) -> tuple[jax.Array, RouterStats]:
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

        def block(x_MD: jax.Array, expert_MC: jax.Array, gate_MC: jax.Array, weights: ExpertWeights) -> jax.Array:
            return exchange_experts(
                x_MD, expert_MC, gate_MC, lambda x, sizes: grouped_swiglu(x, weights, sizes, options.matmul),
                experts=experts, transport=options.transport, capacity=capacity,
            )  # fmt: skip

        chunk = options.chunk_tokens
        if chunk is None or chunk >= x_MD.shape[0]:
            return block(x_MD, expert_MC, routing.gate_MC, weights), stats
        return _in_chunks(block, chunk, (x_MD, expert_MC, routing.gate_MC), weights), stats


def _in_chunks(block: Any, chunk: int, inputs: tuple[jax.Array, ...], weights: ExpertWeights) -> jax.Array:
    """The block on `chunk` tokens at a time; only inputs are kept for the backward pass."""
    shape = inputs[0].shape
    if shape[0] % chunk:
        raise ValueError(f"moe.chunk_tokens ({chunk}) does not divide the {shape[0]} tokens of one device")
    parts = tuple(a.reshape(-1, chunk, a.shape[1]) for a in inputs)
    run = jax.checkpoint(lambda part: block(*part, weights))
    return jax.lax.map(run, parts).reshape(shape)


def _dense_stats(valid_M: Bool[Array, " M"]) -> RouterStats:
    tokens = psum(jnp.sum(valid_M, dtype=jnp.float32), TOKEN_AXES)
    none = jnp.zeros_like(tokens)
    return RouterStats(tokens[None], tokens[None], none, none, none, tokens)
