"""TrainState: what changes from step to step, and where it lives."""

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mixtral_jax.seeds import random_key
from mixtral_jax.train.moments import Blocks, StateDtype, is_moment, read, write, zeros
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
    return _placed(jax.eval_shape(lambda p: create_state(p, optimizer), abstract_params), abstract_params)


def _placed(state: Any, abstract_params: Params) -> Any:
    dotted = partial(jax.tree_util.keystr, simple=True, separator=".")
    by_path = {dotted(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params)}
    everywhere = next(iter(by_path.values()))
    if isinstance(everywhere, jax.sharding.NamedSharding):
        everywhere = jax.sharding.NamedSharding(everywhere.mesh, jax.sharding.PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = dotted(path).removesuffix(".codes").removesuffix(".scales")
        sharding = next((s for own, s in by_path.items() if name.endswith(f".{own}")), everywhere)
        if dotted(path).endswith(".scales") and isinstance(sharding, jax.sharding.NamedSharding):
            sharding = _where_it_divides(sharding, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def as_stored(abstract: TrainState, then: StateDtype) -> TrainState:
    """What to restore of a checkpoint with moments in `then`; on the way to int8 bf16, cast while it is read.

    It is `abstract` itself where no more than a cast is needed.
    """
    adam, params = abstract.optimizer.moments[0], abstract.params
    in_blocks = any(isinstance(moment, Blocks) for moment in jax.tree.leaves(adam.mu, is_leaf=is_moment))
    if in_blocks == (then == "int8"):
        return abstract
    if then == "int8":
        return _with_moments(abstract, *_placed(jax.eval_shape(lambda p: zeros(p, then), params), params))

    def plain(moment: Any) -> Any:
        codes = moment.codes if isinstance(moment, Blocks) else None
        return moment if codes is None else jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16, sharding=codes.sharding)

    return _with_moments(abstract, *(jax.tree.map(plain, tree, is_leaf=is_moment) for tree in (adam.mu, adam.nu)))


def hold_as(abstract: TrainState, state: TrainState) -> TrainState:
    """The state with its moments held as those of `abstract`, converted one by one; what is replaced is freed."""
    old, new = state.optimizer.moments[0], abstract.optimizer.moments[0]
    key, converted = random_key(0), []
    flat = (jax.tree.leaves(tree, is_leaf=is_moment) for tree in (old.mu, old.nu, new.mu, new.nu))
    for m, v, like_m, like_v in zip(*flat, strict=True):
        if not isinstance(m, Blocks) and not isinstance(like_m, Blocks) and m.dtype == like_m.dtype:
            converted.append((m, v))
            continue
        like = (like_m, like_v)
        make = lambda m, v, like=like: write(read(m), read(v), like, key)  # noqa: E731 - for jit
        converted.append(jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, like))(m, v))
        jax.tree.map(lambda x: x.delete(), (m, v))
    structure = jax.tree.structure(old.mu, is_leaf=is_moment)
    return _with_moments(state, *(jax.tree.unflatten(structure, trees) for trees in zip(*converted, strict=True)))


def _with_moments(state: TrainState, mu: Any, nu: Any) -> TrainState:
    adam, *others = state.optimizer.moments
    moments = (adam._replace(mu=mu, nu=nu), *others)
    return state._replace(optimizer=state.optimizer._replace(moments=moments))


def _where_it_divides(sharding: jax.sharding.NamedSharding, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
    """Whole along the dimensions, of fewer scales than the parameter has numbers, that the mesh does not divide."""
    mesh, spec = sharding.mesh, []
    for size, axes in itertools.zip_longest(shape, sharding.spec):
        names = (axes,) if isinstance(axes, str) else axes or ()
        spec.append(axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def start_from(params: Params, optimizer: Optimizer, abstract: TrainState) -> TrainState:
    """The state before the first update around weights (fp32, already placed), which it takes over."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda p: create_state(p, optimizer), out_shardings=shardings, donate_argnums=0)
    return make(params)
