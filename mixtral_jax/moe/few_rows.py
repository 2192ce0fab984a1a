"""The experts on a handful of tokens, as in decoding: time goes into reading weights, so only chosen ones are read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.moe.experts import swiglu

MAX_TOKENS = 128  # up to here every chosen expert on every token costs less than blocks of rows for each expert


def few_rows_swiglu(
    x_MD: Float[Array, "M D"],
    expert_MC: Int[Array, "M C"],
    gate_MC: Float[Array, "M C"],
    w13_LED2F: Float[Array, "L E D 2 F"],
    w2_LEFD: Float[Array, "L E F D"],
    layer: Int[Array, ""],
) -> Float[Array, "M D"]:
    """sum over the choices of gate * expert(x), fp32, for one layer of the stacked weights.

    A loop over the experts that any token chose, each on all tokens. The matrices are sliced out of the stack inside
    the loop: a slice of a whole layer would be copied first. An expert number >= E is nobody's and adds nothing.
    """
    experts, dim, ffn = w13_LED2F.shape[1], w13_LED2F.shape[2], w13_LED2F.shape[4]
    chosen_E = jnp.any(expert_MC.reshape(-1, 1) == jnp.arange(experts)[None, :], axis=0)
    order_E = jnp.argsort(~chosen_E, stable=True)

    def one_expert(i: jax.Array, out_MD: jax.Array) -> jax.Array:
        e = order_E[i]
        w13_1D2F = jax.lax.dynamic_slice(w13_LED2F, (layer, e, 0, 0, 0), (1, 1, dim, 2, ffn))
        w2_1FD = jax.lax.dynamic_slice(w2_LEFD, (layer, e, 0, 0), (1, 1, ffn, dim))
        a_MF = swiglu(jnp.dot(x_MD, w13_1D2F.reshape(dim, 2 * ffn).astype(x_MD.dtype)))
        y_MD = jnp.dot(a_MF, w2_1FD.reshape(ffn, dim).astype(x_MD.dtype), preferred_element_type=jnp.float32)
        gate_M1 = jnp.sum(jnp.where(expert_MC == e, gate_MC, 0), axis=1, keepdims=True)
        # A token that did not choose e adds nothing, whatever e makes of it.
        return out_MD + jnp.where(gate_M1 > 0, y_MD * gate_M1, 0)

    return jax.lax.fori_loop(0, jnp.sum(chosen_E), one_expert, jnp.zeros(x_MD.shape, jnp.float32))
