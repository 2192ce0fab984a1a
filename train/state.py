"""TrainState: what changes from step to step, where it lives, and how it begins."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int

from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.convert.load import place_leaf
from mixtral_jax.convert.pipeline import open_source
from mixtral_jax.convert.stream import Source
from mixtral_jax.convert.table import leaves, nest
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.optimizer import Optimizer, OptimizerState, Params, init_optimizer


class TrainState(NamedTuple):
    """Donated to every step, saved in every checkpoint. `params` are fp32 masters; under LoRA the adapters only."""

    step: Int[Array, ""]  # updates done
    params: Params
    optimizer: OptimizerState


def create_state(params: Params, optimizer: Optimizer) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, init_optimizer(optimizer, params))


def abstract_state(abstract_params: Params, optimizer: Optimizer, shardings: Params | None = None) -> TrainState:
    """Shapes, dtypes and placement of the state. Moments lie where their parameters lie; scalars are everywhere.

    Args:
        abstract_params: ShapeDtypeStruct leaves.
        shardings: a sharding for each parameter; None: one device, the default one.
    """
    state = jax.eval_shape(lambda p: create_state(p, optimizer), abstract_params)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    mesh = jax.tree.leaves(shardings)[0].mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_path = {_names(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        sharding = next((s for own, s in by_path.items() if names[-len(own) :] == own), everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def init_state(make_params: Callable[[], Params], optimizer: Optimizer, abstract: TrainState) -> TrainState:
    """A fresh state, made on the devices where `abstract` says it lies; no device ever holds more than its share."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: create_state(make_params(), optimizer), out_shardings=shardings)()


def start_from(params: Params, optimizer: Optimizer, abstract: TrainState) -> TrainState:
    """A fresh state around loaded weights (fp32, already placed), which it takes over."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda p: create_state(p, optimizer), out_shardings=shardings, donate_argnums=0)
    return make(params)


def read_weights(path: str, abstract_params: Params) -> Params:
    """Weights of an Orbax model directory, of a step of a run, or of a Hugging Face directory, in the dtypes asked for.

    Raises:
        UserError: the directory is none of the three, or a leaf has another shape than the model (it is named).
    """
    root = epath.Path(path)
    try:
        if (root / checkpoint.STATE).exists():  # a step of a run
            return checkpoint.restore(root, {"params": abstract_params}, partial=True)["params"]
        if (root / "params").exists():
            return checkpoint.restore(root / "params", abstract_params)
        if (root / "config.json").exists():
            return _place(path, abstract_params)
    except ValueError as error:
        raise UserError(f"init_from: {error}") from error
    raise UserError(
        f"init_from: {path} is no checkpoint: an Orbax model directory has params/, a step of a run state/, "
        "a Hugging Face directory config.json"
    )


def _place(path: str, abstract: Params) -> Params:
    """A Hugging Face directory onto the devices; each process reads only the parts of its own devices."""
    source = open_source(path)
    wanted = {".".join(_names(where)): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    check_same_leaves(source, {name: leaf.shape for name, leaf in wanted.items()}, path)
    own = {leaf.path: leaf for leaf in leaves(source.config)}
    return nest({name: place_leaf(source, own[name], x.sharding, np.dtype(x.dtype)) for name, x in wanted.items()})


def check_same_leaves(source: Source, wanted: Mapping[str, tuple[int, ...]], path: str) -> None:
    """The checkpoint at `path` holds the parameters of the model, in their shapes.

    Raises:
        ValueError: it does not; the first difference is named.
    """
    found = {leaf.path: leaf.shape for leaf in leaves(source.config)}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted:
            raise ValueError(f"{path} has {name}, which the model does not have")
        if found.get(name) != wanted[name]:
            has = f"has shape {found[name]}" if name in found else "is missing"
            raise ValueError(f"{name} {has} in {path}, but the model has {name} with shape {wanted[name]}")


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
