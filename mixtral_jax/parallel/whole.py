"""A model whose matrices are gathered once, for a loop that would otherwise gather them in every pass."""

import math
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel.sharding import GATHERED, LOGICAL_AXES, WHOLE, param_spec

EXACT = ("router", "scales")  # parameters that no product takes in the compute dtype
Model = TypeVar("Model", bound=nnx.Module)


class Whole(NamedTuple):
    """A parameter as it is used: what its logical axes are then called, its dtype and its place."""

    axes: tuple[str, ...]
    dtype: jnp.dtype
    spec: P
    own: P  # as it is stored


def gathered(model: Model, dtype: jnp.dtype, beside: int) -> Model:
    """The model with its matrices whole along the mesh axes that only store them, in `dtype`.

    Dimensions that are computed on as shards stay shards; what needs no gather is not copied. Where the devices' memory
    does not hold that and `beside` bytes more, the model as it is, whose matrices `gather` brings layer by layer.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return model
    leaves, tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Param))
    params, wholes = [p for _, p in leaves], [as_used(path, p, mesh, dtype) for path, p in leaves]
    pairs = [(p, whole) for p, whole in zip(params, wholes, strict=True) if whole is not None]
    if not pairs or sum(whole_bytes(p, whole, mesh) for p, whole in pairs) + beside > free_memory():
        return model
    values = iter(_gather([p[...] for p, _ in pairs], tuple(whole for _, whole in pairs)))
    made = [
        p if whole is None else nnx.Param(next(values), **(p.get_metadata() | {"axes": whole.axes}))
        for p, whole in zip(params, wholes, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def as_used(path: Any, p: nnx.Param, mesh: Any, dtype: jnp.dtype) -> Whole | None:
    """None for a parameter that nothing gathers."""
    name, axes = jax.tree_util.keystr(path, simple=True, separator="."), p.get_metadata()["axes"]

    def is_cut(axis: str) -> bool:
        return axis in GATHERED and math.prod(mesh.shape[a] for a in LOGICAL_AXES[axis]) > 1

    if not any(map(is_cut, axes)):
        return None
    axes = tuple(WHOLE if is_cut(axis) else axis for axis in axes)
    keeps = name.endswith(EXACT) or not jnp.issubdtype(p.dtype, jnp.floating)
    specs = (param_spec(names, p.shape, mesh.shape, name) for names in (axes, p.get_metadata()["axes"]))
    return Whole(axes, p.dtype if keeps else dtype, *specs)


def whole_bytes(p: nnx.Param, whole: Whole, mesh: Any) -> int:
    """What it takes on one device."""
    return math.prod(NamedSharding(mesh, whole.spec).shard_shape(p.shape)) * jnp.dtype(whole.dtype).itemsize


def free_memory() -> float:
    """Bytes that the fullest device of any process has left, less a tenth of all for what XLA needs; inf: not known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    left = min(0.9 * s.get("bytes_limit", math.inf) - s.get("bytes_in_use", 0) for s in stats)
    return float(np.min(multihost_utils.process_allgather(np.float32(left))))  # all processes must decide alike


@partial(jax.jit, static_argnames="wholes")
def _gather(values: list[jax.Array], wholes: tuple[Whole, ...]) -> list[jax.Array]:
    place = jax.lax.with_sharding_constraint  # twice: cast where it lies, so that it travels in its new dtype
    return [place(place(v.astype(w.dtype), w.own), w.spec) for v, w in zip(values, wholes, strict=True)]
