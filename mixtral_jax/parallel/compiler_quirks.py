"""Habits of compilers that cost time or memory, and how the code here gets round each. No work-around changes a number,
but that a reduction in steps adds in another order.

A habit names the compiler and the newest version that was seen to have it. tests/parallel/test_compiler_quirks.py
compiles thirteen of them without their work-around and fails where the habit is gone: `gone` then takes that version,
newer compilers are left alone, and when no older one is supported the work-around goes too.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int


class Habit(NamedTuple):
    """Something that a compiler does to a program."""

    compiler: Literal["libtpu", "jaxlib"]
    seen: str  # the newest version that was seen to do it
    gone: str | None = None  # the first that does not

    @property
    def here(self) -> bool:
        """Whether the installed compiler has it; where none is installed nothing is compiled."""
        return self.gone is None or _version(self.compiler) < _numbers(self.gone)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@cache
def _version(package: str) -> tuple[int, ...]:
    try:
        return _numbers(metadata.version(package))
    except metadata.PackageNotFoundError:
        return ()


def breaks_on_bf16() -> bool:
    """Whether jaxlib ends the process at a few odd shapes of bf16, on a CPU that multiplies bf16 (docs/install.md)."""
    return (0, 12) <= _version("jaxlib") <= (0, 12, 0, 1)


# ---- scatters and gathers over a torus -------------------------------------------------------------------------------
#
# The transpose of an all-gather is a reduce-scatter. The TPU compiler has no such collective for a group that spans a
# torus of two or three dimensions: it reduces the whole gradient to every chip and throws most of it away. Hence steps,
# each over part of the torus: first the mesh axes one after another, and one axis that fills the machine in two steps.

SCATTERS_TORUS_BY_ALL_REDUCE = Habit("libtpu", "0.0.50.1")  # v5p:4x4x2, v5e:16x16: the full (E, D, 2, F) gradient
# In steps too, where shards end within a tile, or a matrix comes as the only one of a stack.
SCATTERS_FORMS_BY_ALL_REDUCE = Habit("libtpu", "0.0.42.1")
# Of every matrix on a cube (v5p:4x4x4), and of small shards (keys' and values' projections on v5e:16x16); in steps not.
GATHERS_CUBE_BY_ALL_REDUCE = Habit("libtpu", "0.0.50.1")
GATHERS_SMALL_BY_ALL_REDUCE = Habit("libtpu", "0.0.50.1")
SMALL_SHARD = 64 * 2**10  # bytes; 32 kB were seen to be all-reduced, 128 kB not
TILE_ROWS, SUBLANES, LANES = 16, 8, 128  # of a tile of bf16: rows, the least of them, columns

# Chips along the innermost dimension of the torus, and whether it has three dimensions of more than 2, by mesh: a trace
# sees only an abstract mesh, which does not know where its devices stand.
_RINGS: dict[tuple[Any, ...], int] = {}
_CUBES: set[tuple[Any, ...]] = set()

Step = tuple[str | tuple[str, ...], list[list[int]] | None]  # a collective's axis, and groups of devices along it


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


def scatter_steps(mesh: AbstractMesh, axes: tuple[str, ...]) -> list[Step]:
    """Collectives that together reduce and scatter over `axes`; none where all of them have one device."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    if not SCATTERS_TORUS_BY_ALL_REDUCE.here:
        return [(axes, None)] if axes else []
    ring = {axis: _RINGS.get(_key(mesh), 1) if mesh.shape[axis] == mesh.size else 1 for axis in axes}
    return [(axis, groups) for axis in axes for groups in stages(mesh.shape[axis], ring[axis])]


def stages(size: int, ring: int) -> list[list[list[int]] | None]:
    """Groups of each step of a reduce-scatter over `size` devices in rings of `ring`; None: all of them at once.

    The first step leaves device i with the blocks of its ring, the second with its own.
    """
    if not 1 < ring < size:
        return [None]
    across = [[start * ring + place for start in range(size // ring)] for place in range(ring)]
    along = [[start * ring + place for place in range(ring)] for start in range(size // ring)]
    return [across, along]


def gather_steps(mesh: AbstractMesh, axes: tuple[str, ...], shard: jax.Array) -> list[Step]:
    """The same for a gather: at once, over all links of the torus, where the compiler lets it be one."""
    small = GATHERS_SMALL_BY_ALL_REDUCE.here and shard.size * shard.dtype.itemsize <= SMALL_SHARD
    cube = GATHERS_CUBE_BY_ALL_REDUCE.here and _key(mesh) in _CUBES
    steps = scatter_steps(mesh, axes)[::-1] if small or cube else []
    return steps or [(axes, None)]  # where all axes have one device the value must still be typed as a gather's


def scatter_form(g: jax.Array, dim: int, shard: int) -> tuple[jax.Array, int, Callable[[jax.Array], jax.Array]]:
    """`g` in a form whose scatter stays one, the dimension to scatter there, and the way back for what is left.

    `shard`: what a device keeps of `dim`. Good forms: the first of two dimensions, the second or the last of three.
    """
    shape = g.shape
    awkward = shard % TILE_ROWS != 0 or (g.ndim > 2 and math.prod(shape[:dim]) == 1 and dim > 0)
    split = math.gcd(g.size // shape[dim], SUBLANES) if awkward else 1
    if not SCATTERS_FORMS_BY_ALL_REDUCE.here:
        return g, dim, lambda own: own
    if split > 1:  # shards that end within a tile, or two dimensions in the guise of three: only the second of three
        g = jnp.moveaxis(g, dim, 0)
        rest = g.shape[1:]
        g = jnp.swapaxes(g.reshape(shape[dim], split, -1), 0, 1)
        return g, 1, lambda own: jnp.moveaxis(jnp.swapaxes(own, 0, 1).reshape(-1, *rest), 0, dim)
    if dim == 0 or g.ndim == 2:
        g = jnp.moveaxis(g, dim, 0)
        rest = g.shape[1:]
        return g.reshape(shape[dim], -1), 0, lambda own: jnp.moveaxis(own.reshape(-1, *rest), 0, dim)
    last = dim == g.ndim - 1
    g = g.reshape(shape[0], -1, shape[dim]) if last else g.reshape(math.prod(shape[:dim]), shape[dim], -1)
    return g, 2 if last else 1, lambda own: own.reshape(*shape[:dim], -1, *shape[dim + 1 :])


def _key(mesh: AbstractMesh) -> tuple[Any, ...]:
    return (mesh.axis_names, mesh.axis_sizes, mesh.abstract_device)


# ---- a layer's slice of a stack of parameters ------------------------------------------------------------------------

# bfloat16-propagation moves the bare cast of a layer's slice out of the loop over layers: all shards are kept twice.
HOISTS_CASTS = Habit("libtpu", "0.0.50.1")
# The whole stack is copied, before the loop over layers, into the layout in which a slice of it is gathered.
COPIES_STACKS = Habit("libtpu", "0.0.42.1")


def cast(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`w` in `dtype`; to bf16 it is rounded before it is cast, so that the cast is not a bare one."""
    if HOISTS_CASTS.here and (w.dtype, jnp.dtype(dtype)) == (jnp.float32, jnp.bfloat16):
        w = jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    return w.astype(dtype)


def as_stored(w: jax.Array) -> jax.Array:
    """`w`, a layer's slice of three dimensions on a TPU, pinned to the layout of the stack that it was cut from."""
    if not COPIES_STACKS.here or w.ndim != 3:
        return w
    return with_layout_constraint(w, Layout((0, 1, 2) if w.shape[2] % LANES == 0 else (0, 2, 1)))


# On a GPU gathers and scatters have the cut dimension outermost. The stack of all layers takes that layout from its
# slices, weights before the loop over layers, gradients behind it: a copy of all parameters in fp32, and one of their
# gradients.
STACKS_AS_GATHERED = Habit("jaxlib", "0.10.2")


@jax.custom_vjp
def row_major(w: jax.Array) -> jax.Array:
    """`w`, a layer's slice on a GPU, and its gradient, pinned to the layout of the parameters."""
    return with_layout_constraint(w, Layout(tuple(range(w.ndim)))) if STACKS_AS_GATHERED.here else w


row_major.defvjp(lambda w: (row_major(w), None), lambda _, g: (row_major(g),))


# ---- what is made when -----------------------------------------------------------------------------------------------

# A product with a transposed left side goes to Eigen and not to YNNPACK: a third slower on a CPU.
SLOW_ON_TRANSPOSED_LEFT = Habit("jaxlib", "0.10.2")
# And one of bf16 with a side that does not lie in rows takes fp32, or has no instructions of that format.
WIDENS_TRANSPOSED = Habit("jaxlib", "0.10.2")
# A bf16 buffer that is written in parts goes to fp32 and back, all of it, for each part.
WIDENS_UPDATED = Habit("jaxlib", "0.10.2")
# A matrix is transposed in one loop with what cuts it out of a stack, or puts it into one: up to six times as slow.
FUSES_TRANSPOSES = Habit("jaxlib", "0.10.2")
# What is cut out of a stack is copied before a product takes it.
COPIES_SLICES = Habit("jaxlib", "0.10.2")
# A product of one row takes longer than one of two, to compile too; in bf16 its matrix is cast to fp32 first.
SLOW_ON_ONE_ROW = Habit("jaxlib", "0.10.2")
# From fp32 to bf16 by integers is faster, twice behind exp.
NARROWS_SLOWLY = Habit("jaxlib", "0.10.2")
# Comparisons that make a mask are repeated for every head, inside each use of the scores.
REPEATS_COMPARISONS = Habit("jaxlib", "0.10.2")
# What is read of a buffer that a loop writes over is read again behind the first write, and so from a copy.
READS_AGAIN = Habit("libtpu", "0.0.42.1")
# What a loop makes of nothing that changes is made before it, and held as long as it runs, be it for no round at all.
HOISTS_INVARIANTS = Habit("jaxlib", "0.10.2")
# The transpose of a gather is a scatter, for which a TPU sorts.
SORTS_FOR_SCATTERS = Habit("libtpu", "0.0.50.1")


def barrier(habit: Habit, arrays: Any) -> Any:
    """`arrays`, all of them made before any is used."""
    return jax.lax.optimization_barrier(arrays) if habit.here else arrays


def take_chosen(values_ME: Float[Array, "M E"], chosen_MC: Int[Array, "M C"]) -> Float[Array, "M C"]:
    """values[m, chosen[m, c]], by a selection, whose transpose is one too."""
    if not SORTS_FOR_SCATTERS.here:
        return jnp.take_along_axis(values_ME, chosen_MC, axis=1)
    chosen_MCE = chosen_MC[:, :, None] == jnp.arange(values_ME.shape[1])[None, None, :]
    return jnp.sum(jnp.where(chosen_MCE, values_ME[:, None, :], 0), axis=-1)
