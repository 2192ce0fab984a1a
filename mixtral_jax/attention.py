"""Grouped-query attention (2305.13245): parameters, projections, and the exchange of keys along `context`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixtral_jax.config import MixtralConfig
from mixtral_jax.kernels.attention import Backend, attend
from mixtral_jax.layers import apply_rope
from mixtral_jax.lora import Adapter, LoraConfig, base_weight, low_rank
from mixtral_jax.parallel.sharding import axis_index, axis_size, psum
from mixtral_jax.parallel.zigzag import Part, whole_row
from mixtral_jax.quantize import whole_weight

PROJECTIONS = ("query", "key", "value", "output")


class Rows(NamedTuple):
    """Where each token of a packed row stands: what attention masks and rotary angles are made of."""

    positions_BT: Int[Array, "B T"]  # restart at 0 in every segment
    segments_BT: Int[Array, "B T"]  # 0 is padding
    angles_BTh: Float[Array, "B T half"]  # rotary angles of the positions
    key: jax.Array | None = None  # of this layer's dropout in training


class Attention(nnx.Module):
    """Causal attention within segments, heads sharded over `tensor`, keys and values gathered over `context`."""

    def __init__(
        self,
        config: MixtralConfig,
        *,
        key: jax.Array,
        stack: tuple[int, ...] = (),
        dtype: jnp.dtype,
        lora: LoraConfig | None = None,
    ):
        self.window = config.sliding_window
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

    def _linear(self, name: str, x: jax.Array, letters: str, key: jax.Array | None) -> jax.Array:
        """A projection and its adapter, if it has one."""
        y = jnp.einsum(letters, x, whole_weight(getattr(self, name), x.dtype))
        adapter = getattr(self, f"{name}_lora", None)
        if adapter is None:
            return y
        own_key = None if key is None else jax.random.fold_in(key, PROJECTIONS.index(name))
        x_MI = x.reshape(x.shape[0] * x.shape[1], -1)
        return y + low_rank(x_MI, adapter.ready(x.dtype, own_key)).reshape(y.shape)

    def project(
        self, x_BTD: Float[Array, "B T D"], angles_BTh: Float[Array, "B T half"], key: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Rotated queries (B, T, N, H), rotated keys and values (B, T, K, H)."""
        q, k, v = (self._linear(name, x_BTD, "BTD,DNH->BTNH", key) for name in ("query", "key", "value"))
        return apply_rope(q, angles_BTh), apply_rope(k, angles_BTh), v

    def merge(self, y_BTNH: Float[Array, "B T N H"], key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """The output projection, summed over the heads of all devices."""
        return psum(self._linear("output", y_BTNH, "BTNH,NHD->BTD", key), ("tensor",))

    def __call__(self, x_BTD: Float[Array, "B T D"], rows: Rows, backend: Backend) -> Float[Array, "B T D"]:
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, rows.angles_BTh, rows.key)
        names = ("query", "key", "value")
        q, k, v = map(checkpoint_name, (q_BTNH, k_BTKH, v_BTKH), names)
        part, kv_positions, kv_segments = None, rows.positions_BT, rows.segments_BT
        if axis_size("context") > 1:  # queries stay, keys and values come together from the whole row
            part = Part(axis_size("context"), jnp.asarray(axis_index("context")))
            k, v, kv_positions, kv_segments = map(whole_row, (k, v, kv_positions, kv_segments))
        y_BTNH = attend(
            q, k, v,
            q_positions_BT=rows.positions_BT, kv_positions_BS=kv_positions,
            q_segments_BT=rows.segments_BT, kv_segments_BS=kv_segments,
            window=self.window, backend=backend, part=part,
        )  # fmt: skip
        return checkpoint_name(self.merge(y_BTNH, rows.key), "attention_output")
