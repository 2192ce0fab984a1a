"""The experts: SwiGLU feed-forward networks over rows sorted by expert."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.grouped_matmul import grouped_matmul


def swiglu(h_R2F: Float[Array, "R twoF"]) -> Float[Array, "R F"]:
    """silu(h1) * h3, computed in fp32, for h = [h1, h3] side by side (GLU variants 2002.05202, eq. 6)."""
    h1_RF, h3_RF = jnp.split(h_R2F, 2, axis=-1)
    return (jax.nn.silu(h1_RF.astype(jnp.float32)) * h3_RF.astype(jnp.float32)).astype(h_R2F.dtype)


def grouped_swiglu(
    x_RD: Float[Array, "R D"],
    w13_ED2F: Float[Array, "E D 2 F"],
    w2_EFD: Float[Array, "E F D"],
    group_sizes_E: Int[Array, " E"],
    backend: str,
) -> Float[Array, "R D"]:
    """w2( silu(w1 x) * w3 x ) with the matrices of each row's expert; rows behind the last group are undefined."""
    inside_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(group_sizes_E))[:, None]
    h_R2F = checkpoint_name(grouped_matmul(x_RD, w13_ED2F, group_sizes_E, backend=backend), "expert_hidden")

    @partial(jax.checkpoint, prevent_cse=False)  # of the activation nothing is kept but h
    def down(h_R2F: jax.Array, w2_EFD: jax.Array) -> jax.Array:
        # The rows of nobody may hold anything, NaN too: select, never multiply.
        a_RF = swiglu(jnp.where(inside_R1, h_R2F, 0))
        return grouped_matmul(a_RF, w2_EFD, group_sizes_E, backend=backend)

    return checkpoint_name(down(h_R2F, w2_EFD), "expert_output")


def dense_swiglu(
    x_MD: Float[Array, "M D"], w13_D2F: Float[Array, "D 2 F"], w2_FD: Float[Array, "F D"]
) -> Float[Array, "M D"]:
    """The one expert of a dense model."""
    h_M2F = checkpoint_name(jnp.dot(x_MD, w13_D2F.reshape(w13_D2F.shape[0], -1)), "expert_hidden")
    return jnp.dot(swiglu(h_M2F), w2_FD)
