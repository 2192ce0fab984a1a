"""A model whose matrices are gathered and cast once, for a loop that would otherwise do so in every pass."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel.sharding import GATHERED, LOGICAL_AXES, WHOLE, param_spec

# Parameters that no product takes in the compute dtype, by the ends of their names.
EXACT = ("router", "router_lora.a", "router_lora.b", "norm.scale", "scales")
Model = TypeVar("Model", bound=nnx.Module)


class Whole(NamedTuple):
    """A parameter as it is used: what its logical axes are then called, its dtype and its place."""

    axes: tuple[str, ...]
    dtype: jnp.dtype
    spec: P | None  # None: there is no mesh
    own: P | None  # as it is stored


def gathered(model: Model, dtype: jnp.dtype, beside: int, layers: bool = True) -> Model:
    """The model with its matrices in `dtype`, and whole along the mesh axes that only store them.

    Dimensions that are computed on as shards stay shards; what is neither gathered nor cast is not copied, nor, without
    `layers`, what is of a layer. Where memory does not hold that and `beside` bytes more, the model as it is, whose
    matrices `gather` brings layer by layer.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    leaves, tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Param))
    params = [p for _, p in leaves]
    wholes = [as_used(path, p, mesh, dtype) if layers or "layers" not in p.axes else None for path, p in leaves]
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
    """None for a parameter that is used as it is stored."""
    name, axes = jax.tree_util.keystr(path, simple=True, separator="."), p.get_metadata()["axes"]
    dtype = used_dtype(name, p.dtype, dtype)

    def is_cut(axis: str) -> bool:
        return axis in GATHERED and math.prod(mesh.shape[a] for a in LOGICAL_AXES[axis]) > 1

    if mesh.empty:
        return None if dtype == p.dtype else Whole(axes, dtype, None, None)
    if dtype == p.dtype and not any(map(is_cut, axes)):
        return None
    whole = tuple(WHOLE if is_cut(axis) else axis for axis in axes)
    return Whole(whole, dtype, *(param_spec(names, p.shape, mesh.shape, name) for names in (whole, axes)))


def used_dtype(name: str, held: jnp.dtype, compute: jnp.dtype) -> jnp.dtype:
    """What the parameter `name`, held so, is cast to before anything takes it."""
    return held if name.endswith(EXACT) or not jnp.issubdtype(held, jnp.floating) else jnp.dtype(compute)


def whole_bytes(p: nnx.Param, whole: Whole, mesh: Any) -> int:
    """What it takes on one device."""
    shape = p.shape if whole.spec is None else NamedSharding(mesh, whole.spec).shard_shape(p.shape)
    return math.prod(shape) * jnp.dtype(whole.dtype).itemsize


def free_memory() -> float:
    """Bytes that the fullest device of any process of the mesh has left, less a tenth for what XLA needs.

    Devices that are CPUs have shares of their host, of which all are taken to be one.
    """
    devices = jax.local_devices()
    on_host = devices[0].platform == "cpu"
    left = 0.9 * host_memory() / jax.device_count() if on_host else min(map(_left, devices))
    if jax.sharding.get_abstract_mesh().empty:
        return left
    return float(np.min(multihost_utils.process_allgather(np.float32(left))))  # all processes must decide alike


def _left(device: jax.Device) -> float:
    """inf: not known."""
    stats = device.memory_stats() or {}
    return 0.9 * stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)


def host_memory(root: Path = Path("/")) -> float:
    """Bytes that this process may still take of its host, with what the system would give back of its caches.

    As Linux says, and the limits of the control groups that the process is in (version 1 or 2): a container's, a
    job's. Where nobody says, half of all memory.
    """
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = 1024 * _numbers(root / "proc/meminfo").get("MemAvailable:", everything / 2048)
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "" or "memory" in kinds.split(","):
            top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
            place = top / path.lstrip("/")
            groups = [group for group in (place, *place.parents) if group.is_relative_to(top)]
            free = min(free, *(_left_of_group(group, *(OLD_GROUP if kinds else GROUP)) for group in groups))
    return free


# Of a control group: its limit, what it holds, and what of that are pages of files that would be given back.
GROUP = ("memory.max", "memory.current", "inactive_file")
OLD_GROUP = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_of_group(group: Path, limit: str, used: str, cached: str) -> float:
    most, held = (_text(group / name).strip() for name in (limit, used))
    given_back = _numbers(group / "memory.stat").get(cached, 0)
    return int(most) - int(held) + given_back if most.isdigit() and held.isdigit() else math.inf


def _numbers(file: Path) -> dict[str, float]:
    words = [line.split() for line in _text(file).splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:  # of another system, or hidden from a process in a sandbox
        return ""


@partial(jax.jit, static_argnames="wholes")
def _gather(values: list[jax.Array], wholes: tuple[Whole, ...]) -> list[jax.Array]:
    def placed(value: jax.Array, spec: P | None) -> jax.Array:
        return value if spec is None else jax.lax.with_sharding_constraint(value, spec)

    # placed twice: cast where it lies, so that it travels in its new dtype
    return [placed(placed(v.astype(w.dtype), w.own), w.spec) for v, w in zip(values, wholes, strict=True)]
