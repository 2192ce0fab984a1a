"""The router: which experts a token goes to, and with what weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixtral_jax.parallel import take_chosen


class Routing(NamedTuple):
    """What the router decided for M tokens."""

    expert_MC: Int[Array, "M C"]  # chosen experts, best first; ties: the lowest index first
    gate_MC: Float[Array, "M C"]  # fp32 weights of the chosen, sum 1
    probs_ME: Float[Array, "M E"]  # fp32 softmax over all experts
    logits_ME: Float[Array, "M E"]  # fp32


def route(
    x_MD: Float[Array, "M D"],
    w_DE: Float[Array, "D E"],
    top_k: int,
    dtype: jnp.dtype = jnp.float32,
    *,
    chosen_MC: Int[Array, "M C"] | None = None,
) -> Routing:
    """softmax(x W) over all experts, the k largest, renormalised (Mixtral 2401.04088, section 2.1).

    In exact arithmetic the gates equal the paper's softmax over the top-k logits. With k = 1 the gate is always 1, and
    the router learns from the balance loss alone, as in transformers. The chosen indices carry the name `route`, which
    every rematerialisation policy saves: recomputing a near-tie could route elsewhere and give a wrong gradient.
    `chosen`: the experts are these, whatever the logits say; the gates are the softmax of the logits all the same.
    """
    logits_ME = jnp.dot(
        x_MD.astype(dtype),
        w_DE.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    probs_ME = jax.nn.softmax(logits_ME, axis=-1)
    if chosen_MC is None:
        _, chosen_MC = jax.lax.top_k(jax.lax.stop_gradient(probs_ME), top_k)
    expert_MC = checkpoint_name(chosen_MC, "route")
    gate_MC = take_chosen(probs_ME, expert_MC)
    return Routing(expert_MC, gate_MC / jnp.sum(gate_MC, axis=-1, keepdims=True), probs_ME, logits_ME)
