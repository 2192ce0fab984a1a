"""Grouped-query attention (2305.13245): parameters, projections, and the exchange of keys along `context`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mixtral_jax.config import MixtralConfig
from mixtral_jax.kernels import Backend, Tokens, attend, linear, saved
from mixtral_jax.layers import apply_rope
from mixtral_jax.lora import Adapter, LoraConfig, base_weight, low_rank
from mixtral_jax.parallel import Part, axis_index, axis_size, gather_row, psum
from mixtral_jax.quantize import gather_weight

PROJECTIONS = ("query", "key", "value", "output")
# (q (B, T, N, H), k and v (B, T, K, H)), all of new tokens -> (y (B, T, N, H), what the caller wants of the layer)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Projections, rotation, and `attend` between them; heads sharded over `tensor`."""

    def __init__(
        self,
        config: MixtralConfig,
        *,
        key: jax.Array,
        stack: tuple[int, ...] = (),
        dtype: jnp.dtype,
        lora: LoraConfig | None = None,
    ):
        hidden = {"embed": config.hidden_size}
        heads = {"heads": config.num_attention_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        layers = {"layers": stack[0]} if stack else {}
        matrices = {"query": (hidden, heads), "key": (hidden, kv_heads), "value": (hidden, kv_heads)}
        for index, (name, (inputs, outputs)) in enumerate((matrices | {"output": (heads, hidden)}).items()):
            shape, own_key = {**layers, **inputs, **outputs}, jax.random.fold_in(key, index)
            value = config.initializer_range * jax.random.normal(own_key, tuple(shape.values()), dtype)
            contracted = "head_dim" if name == "output" else "embed"
            setattr(self, name, base_weight(value, shape, contracted, lora))
            if lora is not None and lora.adapts(f"attention.{name}"):
                adapter = Adapter(lora, inputs, outputs, key=jax.random.fold_in(own_key, 1), stack=layers, dtype=dtype)
                setattr(self, f"{name}_lora", adapter)

    def _linear(self, name: str, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """A projection and its adapter, if it has one."""
        y = linear(x, gather_weight(getattr(self, name), x.dtype))
        adapter = getattr(self, f"{name}_lora", None)
        if adapter is None:
            return y
        own_rng = None if rng is None else jax.random.fold_in(rng, PROJECTIONS.index(name))
        x_MI = x.reshape(x.shape[0] * x.shape[1], -1)
        return y + low_rank(x_MI, adapter.ready(x.dtype, own_rng)).reshape(y.shape)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles_BTh: Float[Array, "B T half"],
        attend: Attend,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The output, summed over the heads of all devices, and what `attend` kept. `rng`: of adapter dropout."""
        q, k, v = (self._linear(name, x_BTD, rng) for name in ("query", "key", "value"))
        q, k = apply_rope(q, angles_BTh), apply_rope(k, angles_BTh)
        y_BTNH, kept = attend(*map(saved, (q, k, v), ("query", "key", "value")))
        out_BTD = psum(self._linear("output", y_BTNH, rng), ("tensor",))
        return saved(out_BTD, "attention_output"), kept


def attend_row(tokens: Tokens, window: int | None, backend: Backend) -> Attend:
    """Causal attention within the segments of a row, of which this device may hold a part (`context`). Keeps nothing.

    Queries stay; keys and values come together from the whole row.
    """

    def attend_part(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        part, keys = None, tokens
        if axis_size("context") > 1:
            part = Part(axis_size("context"), jnp.asarray(axis_index("context")))
            k, v, *row = map(gather_row, (k, v, *tokens))
            keys = Tokens(*row)
        return attend(q, k, v, queries=tokens, keys=keys, window=window, backend=backend, part=part), None

    return attend_part
