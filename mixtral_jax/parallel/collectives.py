"""Gathering a weight from its shards, with a gradient that stays a reduce-scatter on every machine.

The transpose of an all-gather is a reduce-scatter. The TPU compiler has no such collective for a group that spans a
torus of two or three dimensions: it reduces the whole gradient to every chip and throws most of it away. (Seen in
compiled text: an all-reduce of the full (E, D, 2, F) gradient on v5p:4x4x2 and v5e:16x16.) Hence stages, each over part
of the torus: first the mesh axes one after another, and one axis that fills the machine in two steps. Gathers become
all-reduces of the whole, too: of small shards (keys' and values' projections on v5e:16x16), and of all on a cube
(v5p:4x4x4). They are made in the same steps backwards; others at once, over all links of the torus.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

SMALL_SHARD = 64 * 2**10  # bytes; 32 kB were seen to be all-reduced, 128 kB not
TILE_ROWS, SUBLANES = 16, 8  # of a tile of bf16, and the least rows of one

# Chips along the innermost dimension of the torus, and whether it has three dimensions of more than 2, by mesh: a trace
# sees only an abstract mesh, which does not know where its devices stand.
_RINGS: dict[tuple[Any, ...], int] = {}
_CUBES: set[tuple[Any, ...]] = set()


def remember_torus(mesh: Mesh) -> None:
    """Look up how the devices of `mesh` are wired, for the traces that follow."""
    coords = [tuple(d.coords) for d in mesh.devices.flat] if hasattr(mesh.devices.flat[0], "coords") else []
    key = _key(mesh.abstract_mesh)
    _RINGS[key] = innermost(coords)
    (_CUBES.add if is_cube(coords) else _CUBES.discard)(key)  # an earlier mesh of this key may be wired otherwise


def is_cube(coords: list[tuple[int, ...]]) -> bool:
    """Whether the devices fill three dimensions of a torus, more than 2 deep in each."""
    return sum(len(set(places)) > 2 for places in zip(*coords, strict=True)) == 3


def innermost(coords: list[tuple[int, ...]]) -> int:
    """Length of the first run of devices along one dimension of the torus; 1 where there is nothing to split."""
    moved = [frozenset(d for d, (x, y) in enumerate(zip(coords[0], c, strict=True)) if x != y) for c in coords]
    run = next((i for i, dims in enumerate(moved) if i and dims != moved[1]), len(coords))
    return run if len(coords) % max(run, 1) == 0 and run < len(coords) else 1


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(w: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """`w` whole along `dim`, from the devices along `axes` (the first varies slowest), inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if w.size * w.dtype.itemsize > SMALL_SHARD and _key(mesh) not in _CUBES:
        return jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    for axis in reversed(axes):
        if mesh.shape[axis] > 1:
            for groups in reversed(stages(mesh.shape[axis], _ring(mesh, axis))):
                w = jax.lax.all_gather(w, axis, axis=dim, axis_index_groups=groups, tiled=True)
    # where all axes have one device the value must still be typed as what a gather gives
    return w if any(mesh.shape[axis] > 1 for axis in axes) else jax.lax.all_gather(w, axes, axis=dim, tiled=True)


def _forward(w: jax.Array, axes: tuple[str, ...], dim: int) -> tuple[jax.Array, None]:
    return gather_shards(w, axes, dim), None


def _backward(axes: tuple[str, ...], dim: int, _: None, g: jax.Array) -> tuple[jax.Array]:
    mesh, shape = jax.sharding.get_abstract_mesh(), g.shape
    shard = shape[dim] // math.prod(mesh.shape[axis] for axis in axes)
    awkward = shard % TILE_ROWS != 0 or (g.ndim > 2 and math.prod(shape[:dim]) == 1 and dim > 0)
    split = math.gcd(g.size // shape[dim], SUBLANES) if awkward else 1
    # Of other forms the TPU compiler reduces some to every chip again: the first of two dimensions, the second or the
    # last of three.
    if split > 1:  # shards that end within a tile, or two dimensions in the guise of three: only the second of three
        g, at = jnp.moveaxis(g, dim, 0), 1
        rest = g.shape[1:]
        g = jnp.swapaxes(g.reshape(shape[dim], split, -1), 0, 1)
    elif dim == 0 or g.ndim == 2:
        g, at = jnp.moveaxis(g, dim, 0), 0
        rest = g.shape[1:]
        g = g.reshape(shape[dim], -1)
    elif dim == g.ndim - 1:
        g, at = g.reshape(shape[0], -1, shape[dim]), 2
    else:
        g, at = g.reshape(math.prod(shape[:dim]), shape[dim], -1), 1
    for axis in axes:
        if mesh.shape[axis] > 1:
            for groups in stages(mesh.shape[axis], _ring(mesh, axis)):
                g = jax.lax.psum_scatter(g, axis, scatter_dimension=at, axis_index_groups=groups, tiled=True)
    if split > 1:
        return (jnp.moveaxis(jnp.swapaxes(g, 0, 1).reshape(-1, *rest), 0, dim),)
    if at == 0:
        return (jnp.moveaxis(g.reshape(-1, *rest), 0, dim),)
    return (g.reshape(*shape[:dim], -1, *shape[dim + 1 :]),)


gather_shards.defvjp(_forward, _backward)


def stages(size: int, ring: int) -> list[list[list[int]] | None]:
    """Groups of each step of a reduce-scatter over `size` devices in rings of `ring`; None: all of them at once.

    The first step leaves device i with the blocks of its ring, the second with its own.
    """
    if not 1 < ring < size:
        return [None]
    across = [[start * ring + place for start in range(size // ring)] for place in range(ring)]
    along = [[start * ring + place for place in range(ring)] for start in range(size // ring)]
    return [across, along]


def _ring(mesh: AbstractMesh, axis: str) -> int:
    """Where `axis` is all of the machine, the length of its innermost rings."""
    return _RINGS.get(_key(mesh), 1) if mesh.shape[axis] == mesh.size else 1


def _key(mesh: AbstractMesh) -> tuple[Any, ...]:
    return (mesh.axis_names, mesh.axis_sizes, mesh.abstract_device)
