"""The experts on a handful of tokens, as in decoding: time goes into reading weights, so only chosen ones are read."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.moe import ExpertWeights, dense_swiglu

MAX_TOKENS = 128  # up to here every chosen expert on every token costs less than blocks of rows for each expert


def few_rows_swiglu(
    x_MD: Float[Array, "M D"],
    expert_MC: Int[Array, "M C"],
    gate_MC: Float[Array, "M C"],
    experts: int,
    read: Callable[[jax.Array], ExpertWeights],
) -> Float[Array, "M D"]:
    """sum over the choices of gate * expert(x), fp32.

    A loop over the experts that any token chose, each on all tokens. `read(e)` gives the matrices of one expert,
    adapters and all, inside the loop: what nobody chose is never read. An expert number >= `experts` is nobody's.
    """
    chosen_E = jnp.any(expert_MC.reshape(-1, 1) == jnp.arange(experts)[None, :], axis=0)
    order_E = jnp.argsort(~chosen_E, stable=True)

    def one_expert(i: jax.Array, out_MD: jax.Array) -> jax.Array:
        e = order_E[i]
        y_MD = dense_swiglu(x_MD, read(e)).astype(jnp.float32)
        here_MC = expert_MC == e
        gate_M1 = jnp.sum(jnp.where(here_MC, gate_MC, 0), axis=1, keepdims=True)
        # A token that did not choose e adds nothing, whatever e makes of it; one that did adds NaN where that is NaN.
        return out_MD + jnp.where(jnp.any(here_MC, axis=1, keepdims=True), y_MD * gate_M1, 0)

    return jax.lax.fori_loop(0, jnp.sum(chosen_E), one_expert, jnp.zeros(x_MD.shape, jnp.float32))
