"""The sparse feed-forward block: route -> dispatch -> grouped matmuls -> combine -> statistics."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import MixtralConfig, MoeConfig
from mixtral_jax.lora import Adapter, LoraConfig, base_weight
from mixtral_jax.moe.balance import RouterStats, router_stats
from mixtral_jax.moe.dispatch import limit_capacity
from mixtral_jax.moe.experts import ExpertWeights, dense_swiglu, grouped_swiglu, in_blocks
from mixtral_jax.moe.loops import by_chunks
from mixtral_jax.moe.router import Routing, route
from mixtral_jax.moe.transport import exchange_experts
from mixtral_jax.parallel import gather, psum, take_chosen
from mixtral_jax.quantize import gather_weight

# (x_MD, expert_MC, gate_MC) -> sum over the choices of gate * expert(x); expert number E is nobody's
ApplyExperts = Callable[[Float[Array, "M D"], Int[Array, "M C"], Float[Array, "M C"]], Float[Array, "M D"]]

OF_ALL_EXPERTS = ("router", "router_lora")  # what of the block belongs to no single expert


class MoeOutput(NamedTuple):
    """What the block gives: its output, and what became of the tokens."""

    y_BTD: Float[Array, "B T D"]
    stats: RouterStats  # over this device's tokens
    routing: Routing | None  # of this device's tokens, padding included; None where there is no router


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
        wide: dict[str, Any] = {"reduce_dtype": "float32"}  # of the router, as all of its maths

        def value(index: int, shape: dict[str, int]) -> jax.Array:
            normal = jax.random.normal(jax.random.fold_in(key, index), tuple(shape.values()), dtype)
            return config.initializer_range * normal

        if not config.is_dense:
            shape = {**layers, **routes}
            self.router = nnx.Param(value(0, shape), axes=tuple(shape), **wide)
        w13, w2 = {**experts, **hidden, "gate_up": 2, **ffn}, {**experts, **ffn, **hidden}
        self.w13 = base_weight(value(1, w13), w13, "expert_embed", lora)
        self.w2 = base_weight(value(2, w2), w2, "ffn", lora)
        if lora is not None and lora.adapts("moe.router") and not config.is_dense:
            inputs, outputs = ({name: routes[name]} for name in routes)
            own_key = jax.random.fold_in(key, 6)
            self.router_lora = Adapter(lora, inputs, outputs, key=own_key, stack=layers, dtype=dtype, **wide)
        matrices = {"w1": (hidden, ffn), "w3": (hidden, ffn), "w2": (ffn, hidden)}
        for index, (name, (inputs, outputs)) in enumerate(matrices.items(), start=3):
            if lora is not None and lora.adapts(f"moe.{name}"):
                own_key = jax.random.fold_in(key, index)
                setattr(self, f"{name}_lora", Adapter(lora, inputs, outputs, key=own_key, stack=experts, dtype=dtype))

    def experts(self, dtype: jnp.dtype, rng: jax.Array | None = None, once: bool = False) -> ExpertWeights:
        """The matrices of all experts, gathered, in the compute dtype. `rng`: of adapter dropout. `once`: the rows come
        in no chunks, for each of which the kernel would cast them again, one expert at a time.
        """
        adapters = {}
        for index, name in enumerate(("w1", "w3", "w2")):
            adapter = getattr(self, f"{name}_lora", None)
            if adapter is not None:
                own_rng = None if rng is None else jax.random.fold_in(rng, 100 + index)
                adapters[name] = adapter.ready(dtype, own_rng)
        or_wider = once and in_blocks(self.options.matmul, adapters)
        w13, w2 = (gather_weight(w, dtype, or_wider) for w in (self.w13, self.w2))
        return ExpertWeights(w13, w2, adapters)

    def one_expert(self, layer: jax.Array | int, expert: jax.Array | int, dtype: jnp.dtype) -> ExpertWeights:
        """Of a stack of layers on one device: the matrices of one expert of one layer, as a stack of one.

        They are sliced out of the stack at once: a slice of a whole layer would be copied first.
        """

        def part(path: Any, p: jax.Array) -> jax.Array:
            if path[0].key in OF_ALL_EXPERTS:
                return p
            box = jax.lax.dynamic_slice(p, (layer, expert, *(0,) * (p.ndim - 2)), (1, 1, *p.shape[2:]))
            return box[0]

        graphdef, state = nnx.split(self)
        sliced = jax.tree_util.tree_map_with_path(part, nnx.to_pure_dict(state))
        return nnx.merge(graphdef, sliced).experts(dtype)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        valid_BT: Bool[Array, "B T"],
        rng: jax.Array | None = None,
        apply_experts: ApplyExperts | None = None,
        chosen_MC: Int[Array, "M C"] | None = None,
    ) -> MoeOutput:
        """The experts' weighted sum for each token, and what became of the tokens.

        Args:
            valid_BT: what is no padding.
            rng: of adapter dropout.
            apply_experts: another way to apply the chosen experts than to all rows at once, sorted by expert.
            chosen_MC: the experts to take, in place of the router's own choices.
        """
        x_MD, valid_M = x_BTD.reshape(-1, x_BTD.shape[-1]), valid_BT.reshape(-1)
        if self.config.is_dense:
            routing, stats = None, _dense_stats(valid_M)
            expert_MC = jnp.where(valid_M, 0, 1)[:, None]
            gate_MC = jnp.ones(expert_MC.shape, jnp.float32)
        else:
            dtype = jnp.float32 if self.options.router_dtype == "float32" else x_MD.dtype
            router_DE = gather(self.router, jnp.float32)
            if hasattr(self, "router_lora"):  # so small that W + s A B is formed; nothing of its input is dropped
                own = self.router_lora.ready(jnp.float32, None)
                router_DE += jnp.dot(own.a * own.scale, own.b, precision=jax.lax.Precision.HIGHEST)
            routing = route(x_MD, router_DE, self.config.num_experts_per_tok, dtype, chosen_MC=chosen_MC)
            gate_MC = routing.gate_MC
            # Padding goes to an expert that nobody has: never sent, never computed, never counted.
            expert_MC = jnp.where(valid_M[:, None], routing.expert_MC, self.config.num_local_experts)
            wanted_MC, capacity = expert_MC, self._capacity(x_MD.shape[0])
            if capacity is not None:
                # the only gate of a token is 1: its probability before that tells tokens apart
                standing_MC = gate_MC if gate_MC.shape[1] > 1 else take_chosen(routing.probs_ME, routing.expert_MC)
                order = self.options.capacity_order
                expert_MC = limit_capacity(wanted_MC, standing_MC, self.config.num_local_experts, capacity, order)
            dropped_MC = None if capacity is None else expert_MC != wanted_MC
            stats = router_stats(routing, valid_M.astype(jnp.float32), dropped_MC)
        if apply_experts is None:
            y_MD, again = self._apply_grouped(x_BTD.dtype, rng, x_MD.shape[0])(x_MD, expert_MC, gate_MC)
            stats = stats._replace(overflow_L=jax.lax.stop_gradient(again))
        else:
            y_MD = apply_experts(x_MD, expert_MC, gate_MC)
        out_MD = psum(y_MD.astype(x_BTD.dtype), ("tensor",))
        return MoeOutput(out_MD.reshape(x_BTD.shape), stats, routing)

    def _capacity(self, tokens: int) -> int | None:
        """Choices that one expert takes of a device's tokens, at most."""
        if self.options.capacity_factor is None:
            return None
        choices = self.options.capacity_factor * tokens * self.config.num_experts_per_tok
        return min(tokens, math.ceil(choices / self.config.num_local_experts))

    def _apply_grouped(self, dtype: jnp.dtype, rng: jax.Array | None, tokens: int) -> Callable[..., Any]:
        """All of a device's tokens at once, or `chunk_tokens` at a time: as ApplyExperts, and RouterStats.overflow."""
        if self.config.is_dense:
            weights = self.experts(dtype, rng)
            return lambda x_MD, *_: (dense_swiglu(x_MD, weights), jnp.zeros(()))
        options, experts, chunk = self.options, self.config.num_local_experts, self.options.chunk_tokens
        chunk = None if chunk is None or chunk >= tokens else chunk
        weights = self.experts(dtype, rng, once=chunk is None)

        def run(weights: ExpertWeights, x_RD: jax.Array, gate_R: jax.Array, sizes_E: jax.Array) -> jax.Array:
            return grouped_swiglu(x_RD, gate_R, weights, sizes_E, options.matmul)

        def apply(weights: ExpertWeights, x_MD: Any, gate_MC: Any, expert_MC: Any, _: jax.Array | None = None) -> Any:
            return exchange_experts(
                weights, x_MD, expert_MC, gate_MC, run, experts=experts, transport=options.transport,
                capacity=self._capacity(tokens), factor=options.buffer_factor,
            )  # fmt: skip

        if chunk is None:
            return lambda x_MD, expert_MC, gate_MC: apply(weights, x_MD, gate_MC, expert_MC)
        return partial(by_chunks, apply, chunk, experts, weights)


def _dense_stats(valid_M: Bool[Array, " M"]) -> RouterStats:
    tokens = jnp.sum(valid_M, dtype=jnp.float32)
    none = jnp.zeros_like(tokens)
    return RouterStats(tokens[None], tokens[None], none, none, none, none, none, tokens)
