"""Rotary position embedding, half-split convention: dimension i is rotated with dimension i + H/2.

Hugging Face stores Mixtral so; Mistral's own files rotate neighbours (2i, 2i + 1) and need their rows permuted.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_angles(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "B T half"]:
    """position * theta^(-2i/H), fp32 (RoFormer 2104.09864, eq. 15)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(theta) ** exponent
    return positions_BT[..., None].astype(jnp.float32) * frequency[None, None, :]


def apply_rope(x_BTNH: Float[Array, "B T N H"], angles_BTh: Float[Array, "B T half"]) -> Float[Array, "B T N H"]:
    """[x1 cos - x2 sin, x2 cos + x1 sin] with x1, x2 the halves of the head; in fp32, returned in x's dtype."""
    cos, sin = jnp.cos(angles_BTh)[:, :, None, :], jnp.sin(angles_BTh)[:, :, None, :]
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)
