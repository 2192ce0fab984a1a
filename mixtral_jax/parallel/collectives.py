"""Collectives, and what a device knows of its place, inside the model's shard_map: the identity without a mesh.

Each is written out once, and `check_vma=True` makes jax refuse a value that claims to be equal on all devices and was
never reduced.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel.mesh import MESH_AXES


class Machine(NamedTuple):
    """What computes: cpu, gpu or tpu, and the name that jax gives such a device."""

    platform: str
    kind: str = ""

    @classmethod
    def of(cls, device: Any) -> "Machine":
        """That of a device, which may be one that is only compiled for."""
        return cls("gpu" if device.platform in ("cuda", "rocm") else device.platform, device.device_kind)


def machine() -> Machine:
    """Of the mesh in context, which may be one that is only compiled for, or of this process's devices."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return Machine.of(device or jax.devices()[0])


def platform() -> str:
    """cpu, gpu or tpu, of the machine that computes."""
    return machine().platform


def inside() -> bool:
    """Whether this code is being traced for one device of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and len(mesh.manual_axes) > 0


def axis_size(name: str | tuple[str, ...]) -> int:
    """Devices along a mesh axis, or along several taken together; 1 without a mesh."""
    return jax.lax.axis_size(name) if inside() else 1


def axis_index(name: str | tuple[str, ...]) -> jax.Array | int:
    """This device's place along a mesh axis, or along several taken as one (the first varies slowest)."""
    return jax.lax.axis_index(name) if inside() else 0


def shard_key(key: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A random key of this device's own along `axes`."""
    for axis in axes if inside() else ():
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def psum(x: Any, axes: Sequence[str]) -> Any:
    """Sum over the devices along `axes`."""
    return jax.tree.map(lambda a: jax.lax.psum(varying(a, axes), tuple(axes)), x) if inside() else x


def axis_max(x: Any, axes: Sequence[str]) -> Any:
    """Maximum over the devices along `axes`; no gradient."""
    if not inside():
        return x
    return jax.tree.map(lambda a: jax.lax.pmax(varying(jax.lax.stop_gradient(a), axes), tuple(axes)), x)


def variance(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which `x` differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """`x` typed as different on each device along `axes`; the transpose is the psum of its gradient."""
    if not inside():
        return x
    missing = tuple(a for a in axes if a not in variance(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
    """Zeros, typed as varying over the same mesh axes as `like`."""
    return varying(jnp.zeros(shape, dtype), sorted(variance(like)))


def same_variance(*trees: Any) -> tuple[Any, ...]:
    """The arrays of all trees with one common variance: what a custom_vjp wants of its arguments."""
    if not inside():
        return trees
    axes = sorted(frozenset().union(*map(variance, jax.tree.leaves(trees))))
    return jax.tree.map(lambda a: varying(a, axes), trees)


def unchecked(run: Callable[..., Any], *args: Any) -> Any:
    """run(*args), a kernel of Pallas or cuDNN, without the check of variance; results are typed as varying like `args`.

    Such kernels do not declare how their outputs vary. Left as they are, results would be typed as equal on all
    devices. Not differentiable: forward and backward of a kernel are each wrapped, inside one custom_vjp.
    """
    axes = tuple(sorted(frozenset[str]().union(*map(variance, jax.tree.leaves(args)))))
    if not axes:
        return run(*args)
    out = jax.shard_map(run, in_specs=P(), out_specs=P(), axis_names=set(), check_vma=False)(*args)
    return jax.tree.map(lambda x: varying(x, axes), out)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_shards(w: jax.Array, dtype: jnp.dtype, axes: tuple[str, ...], dim: int) -> jax.Array:
    """`w` in `dtype`, whole along `dim`, from the devices along `axes` (the first varies slowest), in a shard_map.

    What travels has `dtype`. The gradient travels and is added up in the dtype of `w`: a reduce-scatter on every
    machine.
    """
    w = quirks.cast(w, dtype)
    for axis, groups in quirks.gather_steps(jax.sharding.get_abstract_mesh(), axes, w):
        w = jax.lax.all_gather(w, axis, axis=dim, axis_index_groups=groups, tiled=True)
    return w


def _gather_forward(w: jax.Array, dtype: jnp.dtype, axes: tuple[str, ...], dim: int) -> tuple[jax.Array, jax.Array]:
    return gather_shards(w, dtype, axes, dim), jnp.zeros((0,), w.dtype)


def _gather_backward(_: jnp.dtype, axes: tuple[str, ...], dim: int, like: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    mesh, g = jax.sharding.get_abstract_mesh(), g.astype(like.dtype)
    g, at, back = quirks.scatter_form(g, dim, g.shape[dim] // math.prod(mesh.shape[axis] for axis in axes))
    for axis, groups in quirks.scatter_steps(mesh, axes):
        g = jax.lax.psum_scatter(g, axis, scatter_dimension=at, axis_index_groups=groups, tiled=True)
    return (back(g),)


gather_shards.defvjp(_gather_forward, _gather_backward)


def assemble(x: jax.Array, dim: int, axes: tuple[str, ...]) -> jax.Array:
    """The whole array from the devices' shards along `dim`, the same on all of them; x itself without a mesh."""
    if axis_size(MESH_AXES) == 1:
        return x
    shape = (*x.shape[:dim], x.shape[dim] * axis_size(axes), *x.shape[dim + 1 :])
    start: list[Any] = [0] * x.ndim
    start[dim] = axis_index(axes) * x.shape[dim]
    return psum(jax.lax.dynamic_update_slice(jnp.zeros(shape, x.dtype), x, start), axes)
