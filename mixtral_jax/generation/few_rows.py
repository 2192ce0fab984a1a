"""The experts on a handful of tokens, as in decoding: time goes into reading weights, so only chosen ones are read."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mixtral_jax.model import Block, Mixtral, compute_dtype
from mixtral_jax.moe import OF_ALL_EXPERTS, ExpertWeights, dense_swiglu

MAX_TOKENS = 128  # up to here every chosen expert on every token costs less than blocks of rows for each expert


class Apart(NamedTuple):
    """A stack of layers taken apart: what a product takes is an array of its own (compiler_quirks.COPIES_SLICES)."""

    blocks: tuple[Block, ...]  # of experts they have none
    experts: tuple[tuple[ExpertWeights, ...], ...]  # by layer; each a stack of one, in the compute dtype


@jax.jit
def take_apart(model: Mixtral) -> Apart:
    """The layers of a model on one device, for steps of up to MAX_TOKENS tokens."""
    stack, dtype = model.dropless().layers, compute_dtype(model.compute.dtype)
    graphdef, state = nnx.split(stack)
    layers, experts = range(model.config.num_hidden_layers), range(model.config.num_local_experts)

    def block(layer: int) -> Block:
        def part(path: Any, p: jax.Array) -> jax.Array:
            is_expert = path[0].key == "moe" and path[1].key not in OF_ALL_EXPERTS
            return p[layer, :0] if is_expert else p[layer]

        return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(part, nnx.to_pure_dict(state)))

    matrices = tuple(tuple(stack.moe.one_expert(layer, e, dtype) for e in experts) for layer in layers)
    return Apart(tuple(map(block, layers)), matrices)


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
    chosen_E = _chosen(expert_MC, experts)
    order_E = jnp.argsort(~chosen_E, stable=True)

    def one_expert(i: jax.Array, out_MD: jax.Array) -> jax.Array:
        return out_MD + _share(x_MD, expert_MC, gate_MC, order_E[i], read(order_E[i]))

    return jax.lax.fori_loop(0, jnp.sum(chosen_E), one_expert, jnp.zeros(x_MD.shape, jnp.float32))


def few_rows_apart(
    x_MD: Float[Array, "M D"],
    expert_MC: Int[Array, "M C"],
    gate_MC: Float[Array, "M C"],
    weights_E: Sequence[ExpertWeights],
) -> Float[Array, "M D"]:
    """The same, of experts whose matrices are arrays of their own.

    Where there are two choices for each expert all are computed, though by chance a seventh is nobody's: they run side
    by side, which branches do not.
    """
    chosen_E, out_MD = _chosen(expert_MC, len(weights_E)), jnp.zeros(x_MD.shape, jnp.float32)
    for e, weights in enumerate(weights_E):

        def add(out_MD: jax.Array, weights: ExpertWeights, e: int = e) -> jax.Array:
            return out_MD + _share(x_MD, expert_MC, gate_MC, e, weights)

        if expert_MC.size >= 2 * len(weights_E):
            out_MD = add(out_MD, weights)
        else:
            out_MD = jax.lax.cond(chosen_E[e], add, lambda out_MD, _: out_MD, out_MD, weights)
    return out_MD


def _chosen(expert_MC: jax.Array, experts: int) -> jax.Array:
    return jnp.any(expert_MC.reshape(-1, 1) == jnp.arange(experts)[None, :], axis=0)


def _share(
    x_MD: jax.Array, expert_MC: jax.Array, gate_MC: jax.Array, e: jax.Array | int, weights: ExpertWeights
) -> jax.Array:
    """What expert e adds."""
    y_MD = dense_swiglu(x_MD, weights).astype(jnp.float32)
    here_MC = expert_MC == e
    gate_M1 = jnp.sum(jnp.where(here_MC, gate_MC, 0), axis=1, keepdims=True)
    # A token that did not choose e adds nothing, whatever e makes of it; one that did adds NaN where that is NaN.
    return jnp.where(jnp.any(here_MC, axis=1, keepdims=True), y_MD * gate_M1, 0)
