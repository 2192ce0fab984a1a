"""RMS norm, token embedding, output head, and rotary position embedding.

Rotary position embedding, half-split convention: dimension i is rotated with dimension i + H/2.

Hugging Face stores Mixtral so; Mistral's own files rotate neighbours (2i, 2i + 1) and need their rows permuted.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mixtral_jax.parallel import axis_index, axis_size, gather, psum, same_variance, zeros


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """scale * x / sqrt(mean(x^2) + eps). Statistics in fp32, cast to x's dtype, then times the scale (1910.07467).

    The product is one of fp32 numbers, which rounds alike, so that the scale's gradient is added up in fp32.
    """
    # a matrix: over rows in more dimensions XLA's sums of products take up to 16 times as long on a CPU
    x_MD = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    inverse_M1 = jax.lax.rsqrt(jnp.mean(jnp.square(x_MD), axis=-1, keepdims=True) + eps)
    unit_MD, scale = (a.astype(x.dtype).astype(jnp.float32) for a in (x_MD * inverse_M1, scale))
    return (unit_MD * scale[None, :]).astype(x.dtype).reshape(x.shape)


class RMSNorm(nnx.Module):
    """RMS norm with a learned scale; `stack` is the leading shape of stacked layers."""

    def __init__(self, dim: int, eps: float, *, stack: tuple[int, ...] = (), dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((*stack, dim), dtype), axes=("layers",) * len(stack) + ("norm",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, gather(self.scale, x.dtype), self.eps)


@jax.custom_vjp
def look_up(w_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """w[token]. Its gradient adds in fp32: in bf16 the row of a frequent token stops growing."""
    return jnp.take(w_VD, tokens_BT, axis=0, mode="clip")


def _look_up_forward(w_VD, tokens_BT):
    return look_up(w_VD, tokens_BT), (jnp.zeros((w_VD.shape[0], 0), w_VD.dtype), tokens_BT)


def _look_up_backward(saved, g_BTD):
    like, tokens_BT = saved
    none_VD = zeros((like.shape[0], g_BTD.shape[-1]), jnp.float32, g_BTD)
    return none_VD.at[tokens_BT].add(g_BTD.astype(jnp.float32), mode="clip").astype(like.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Embedding(nnx.Module):
    """Token embedding, vocabulary-parallel over `tensor`; drawn in `dtype`, held in `held`."""

    def __init__(self, vocab: int, dim: int, std: float, *, key: jax.Array, dtype: jnp.dtype, held: jnp.dtype):
        value = std * jax.random.normal(key, (vocab, dim), dtype)
        self.weight = nnx.Param(value.astype(held), axes=("vocab", "embed"), vocab=vocab)

    def __call__(self, tokens_BT: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        w_VD = gather(self.weight, dtype)
        if axis_size("tensor") == 1:
            return psum(look_up(*same_variance(w_VD, tokens_BT)), ("tensor",))
        local_BT = tokens_BT - axis_index("tensor") * w_VD.shape[0]
        here_BT = (local_BT >= 0) & (local_BT < w_VD.shape[0])
        x_BTD = look_up(*same_variance(w_VD, jnp.where(here_BT, local_BT, 0)))
        return psum(jnp.where(here_BT[..., None], x_BTD, 0), ("tensor",))


class Head(nnx.Module):
    """The untied output matrix (D, V), vocabulary-parallel over `tensor`; drawn in `dtype`, held in `held`."""

    def __init__(self, dim: int, vocab: int, std: float, *, key: jax.Array, dtype: jnp.dtype, held: jnp.dtype):
        value = std * jax.random.normal(key, (dim, vocab), dtype)
        self.weight = nnx.Param(value.astype(held), axes=("embed", "vocab"), vocab=vocab)


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
