"""Grouped-query attention (2305.13245): parameters, projections, and the exchange of keys along `context`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixtral_jax.config import MixtralConfig
from mixtral_jax.kernels.attention import attend
from mixtral_jax.rope import apply_rope
from mixtral_jax.sharding import axis_size, gather, psum


class Rows(NamedTuple):
    """Where each token of a packed row stands: what attention masks and rotary angles are made of."""

    positions_BT: Int[Array, "B T"]  # restart at 0 in every segment
    segments_BT: Int[Array, "B T"]  # 0 is padding
    angles_BTh: Float[Array, "B T half"]  # rotary angles of the positions


class Attention(nnx.Module):
    """Causal attention within segments, heads sharded over `tensor`, keys and values gathered over `context`."""

    def __init__(self, config: MixtralConfig, *, key: jax.Array, stack: tuple[int, ...] = (), dtype: jnp.dtype):
        self.window = config.sliding_window
        d, n, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        names = ("layers",) * len(stack)

        def weight(index: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            value = jax.random.normal(jax.random.fold_in(key, index), stack + shape, dtype)
            return nnx.Param(config.initializer_range * value, axes=names + axes)

        self.query = weight(0, (d, n, h), ("embed", "heads", "head_dim"))
        self.key = weight(1, (d, k, h), ("embed", "kv_heads", "head_dim"))
        self.value = weight(2, (d, k, h), ("embed", "kv_heads", "head_dim"))
        self.output = weight(3, (n, h, d), ("heads", "head_dim", "embed"))

    def project(self, x_BTD: Float[Array, "B T D"], angles_BTh: Float[Array, "B T half"]) -> tuple[jax.Array, ...]:
        """Rotated queries (B, T, N, H), rotated keys and values (B, T, K, H)."""
        q_BTNH, k_BTKH, v_BTKH = (
            jnp.einsum("BTD,DNH->BTNH", x_BTD, gather(w, x_BTD.dtype)) for w in (self.query, self.key, self.value)
        )
        return apply_rope(q_BTNH, angles_BTh), apply_rope(k_BTKH, angles_BTh), v_BTKH

    def merge(self, y_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The output projection, summed over the heads of all devices."""
        return psum(jnp.einsum("BTNH,NHD->BTD", y_BTNH, gather(self.output, y_BTNH.dtype)), ("tensor",))

    def __call__(self, x_BTD: Float[Array, "B T D"], rows: Rows, backend: str) -> Float[Array, "B T D"]:
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, rows.angles_BTh)
        names = ("query", "key", "value")
        q, k, v = map(checkpoint_name, (q_BTNH, k_BTKH, v_BTKH), names)
        split = axis_size("context") > 1
        if split:  # queries stay, keys and values come together from the whole row
            k, v, kv_positions, kv_segments = (
                jax.lax.all_gather(a, "context", axis=1, tiled=True)
                for a in (k, v, rows.positions_BT, rows.segments_BT)
            )
        else:
            kv_positions, kv_segments = rows.positions_BT, rows.segments_BT
        y_BTNH = attend(
            q, k, v,
            q_positions_BT=rows.positions_BT, kv_positions_BS=kv_positions,
            q_segments_BT=rows.segments_BT, kv_segments_BS=kv_segments,
            window=self.window, backend=backend, ordered=not split,
        )  # fmt: skip
        return checkpoint_name(self.merge(checkpoint_name(y_BTNH, "attended")), "attention_output")
