"""The experts on a handful of tokens, as in decoding: time goes into reading weights, so only chosen ones are read."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels import native_bf16
from mixtral_jax.model import Block, Mixtral, compute_dtype
from mixtral_jax.moe import OF_ALL_EXPERTS, ExpertWeights, dense_swiglu
from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel import platform, used_dtype

MAX_TOKENS = 128  # up to here every chosen expert on every token costs less than blocks of rows for each expert
SMALL_EXPERT = 2**20  # bytes: copies of smaller ones stay in a processor's cache, and cost less than more to compile
FEWEST_STEPS = 32  # to take the layers apart costs as much as they save in 10 to 30
MOST_PROGRAMS = 256  # of layers x experts: a quarter of a minute to compile


class Apart(NamedTuple):
    """A stack of layers taken apart: what a product takes is an array of its own (compiler_quirks.COPIES_SLICES)."""

    blocks: tuple[list[jax.Array], ...]  # leaves, in the order of the stack's; those of experts are empty
    experts: tuple[tuple[ExpertWeights, ...], ...]  # by layer; each a stack of one, in the compute dtype


def apart_bytes(model: Mixtral) -> int:
    """What the layers take when they are apart."""
    return sum(w.size for w in jax.tree.leaves(model.layers)) * compute_dtype(model.compute.dtype).itemsize


def wants_apart(model: Mixtral, rows: int, new_tokens: int) -> bool:
    """Whether steps of so many rows on one device are faster by layers taken apart, as measured (docs/decisions.md).

    Not with a base in blocks, which is held so to be small.
    """
    config, leaves = model.config, jax.tree.leaves(model.layers)
    expert = 3 * config.hidden_size * config.intermediate_size * compute_dtype(model.compute.dtype).itemsize
    pays = expert >= SMALL_EXPERT and new_tokens >= FEWEST_STEPS and rows <= MAX_TOKENS
    programs = config.num_hidden_layers * config.num_local_experts
    is_plain = all(jnp.issubdtype(w.dtype, jnp.floating) for w in leaves)
    copies = quirks.COPIES_SLICES.here and platform() == "cpu" and native_bf16()
    return copies and pays and is_plain and programs <= MOST_PROGRAMS


def take_apart(model: Mixtral) -> Apart:
    """The layers of a model on one device, for steps of up to MAX_TOKENS tokens."""
    leaves, tree = jax.tree.flatten(model.layers)
    layers = range(model.config.num_hidden_layers)
    parts = [_take_layer(leaves, layer, tree, compute_dtype(model.compute.dtype)) for layer in layers]
    return Apart(*zip(*parts, strict=True))


@partial(jax.jit, static_argnums=(2, 3))
def _take_layer(
    leaves: list[jax.Array], layer: jax.Array, tree: Any, dtype: jnp.dtype
) -> tuple[list[jax.Array], tuple[ExpertWeights, ...]]:
    stack: Block = jax.tree.unflatten(tree, leaves)
    _, state = nnx.split(stack)

    def part(path: Any, p: jax.Array) -> jax.Array:
        name = [key.key for key in path]
        if name[0] == "moe" and name[1] not in OF_ALL_EXPERTS:
            return p[0, :0]
        return p[layer].astype(used_dtype(".".join(name), p.dtype, dtype))

    own = jax.tree.leaves(jax.tree_util.tree_map_with_path(part, nnx.to_pure_dict(state)))
    experts = range(stack.moe.config.num_local_experts)
    return own, tuple(stack.moe.one_expert(layer, expert, dtype) for expert in experts)


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
    """The same, of experts whose matrices are arrays of their own: each in a branch."""
    chosen_E, out_MD = _chosen(expert_MC, len(weights_E)), jnp.zeros(x_MD.shape, jnp.float32)
    for e, weights in enumerate(weights_E):

        def add(out_MD: jax.Array, weights: ExpertWeights, e: int = e) -> jax.Array:
            return out_MD + _share(x_MD, expert_MC, gate_MC, e, weights)

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
