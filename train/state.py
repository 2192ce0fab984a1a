"""TrainState: what changes from step to step, and where it lives."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mixtral_jax.train.optimizer import Optimizer, OptimizerState, Params, init_optimizer


class TrainState(NamedTuple):
    """Donated to every step, saved in every checkpoint. `params` are fp32 masters; under LoRA the adapters only."""

    step: Int[Array, ""]  # updates done
    params: Params
    optimizer: OptimizerState


def create_state(params: Params, optimizer: Optimizer) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, init_optimizer(optimizer, params))


def abstract_state(abstract_params: Params, optimizer: Optimizer) -> TrainState:
    """Shapes, dtypes and placement of the state. Moments lie where their parameters lie; scalars are everywhere.

    Args:
        abstract_params: ShapeDtypeStruct leaves with their shardings.
    """
    state = jax.eval_shape(lambda p: create_state(p, optimizer), abstract_params)
    dotted = partial(jax.tree_util.keystr, simple=True, separator=".")
    by_path = {dotted(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params)}
    everywhere = next(iter(by_path.values()))
    if isinstance(everywhere, jax.sharding.NamedSharding):
        everywhere = jax.sharding.NamedSharding(everywhere.mesh, jax.sharding.PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = next((s for own, s in by_path.items() if dotted(path).endswith(f".{own}")), everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def start_from(params: Params, optimizer: Optimizer, abstract: TrainState) -> TrainState:
    """The state before the first update around weights (fp32, already placed), which it takes over."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda p: create_state(p, optimizer), out_shardings=shardings, donate_argnums=0)
    return make(params)
