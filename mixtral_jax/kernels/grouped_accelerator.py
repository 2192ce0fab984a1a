"""Grouped matmul on accelerators: megablox, JAX's Pallas kernel for TPU, and tokamax on NVIDIA GPUs.

Both visit only the tiles of rows that belong to a group: a buffer that is partly filled costs what it holds. Tested
here: megablox by its interpreter and by compiling for TPUs, tokamax not at all (docs/sharding.md).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.parallel import unchecked

# Rows, contracted and produced columns of a tile: about 12 MB of the 16 MB that a kernel may use, double buffered.
TILE_ROWS = 512
TILE_COLUMNS = {2: 1024, 4: 512}  # by bytes of an element
NARROWEST = 64  # columns of a tile in tokamax's kernels for Hopper: 128 bytes of bf16


def grouped_rows(
    backend: str,
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    sizes_E: Int[Array, " E"],
    transpose: bool,
    *,
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """x[r] @ w[g], or x[r] @ w[g]^T; rows of no group hold anything. `interpret` (megablox only) runs anywhere."""
    if backend == "tokamax":
        return _tokamax(x_RD, w_EDF, sizes_E, ((1,), (2 if transpose else 1,)), ([0], [0]), x_RD.dtype)
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    produced = w_EDF.shape[1 if transpose else 2]
    tiling = _tiling(x_RD, produced)

    def run(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return gmm(x_RD, w_EDF, sizes_E, x_RD.dtype, tiling, transpose_rhs=transpose, interpret=interpret)

    return unchecked(run, _padded(x_RD, tiling[0]), w_EDF, sizes_E)[: x_RD.shape[0]]


def grouped_weight_gradient(
    backend: str,
    x_RD: Float[Array, "R D"],
    dy_RF: Float[Array, "R F"],
    sizes_E: Int[Array, " E"],
    dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """x^T dy over the rows of each group, accumulated in fp32. `interpret`: megablox only."""
    if backend == "tokamax":
        inside_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(sizes_E))[:, None]
        x_RD, dy_RF = jnp.where(inside_R1, x_RD, 0), jnp.where(inside_R1, dy_RF, 0)
        return _tokamax(x_RD, dy_RF, sizes_E, ((0,), (0,)), ([0], []), dtype)
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = _tiling(x_RD, dy_RF.shape[1])

    def run(x_DR: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return tgmm(x_DR, dy_RF, sizes_E, dtype, tiling, interpret=interpret)

    x_RD, dy_RF = (_padded(a, tiling[0]) for a in (x_RD, dy_RF))
    return unchecked(run, x_RD.T, dy_RF, sizes_E)


def _tiling(x_RD: jax.Array, produced: int) -> tuple[int, int, int]:
    """Sizes of a tile: rows, contracted columns, produced columns; none larger than the problem, in lanes of 128."""
    most = TILE_COLUMNS[max(2, x_RD.dtype.itemsize)]
    tile = [min(most, -(-size // 128) * 128) for size in (x_RD.shape[1], produced)]
    return min(TILE_ROWS, -(-x_RD.shape[0] // 128) * 128), tile[0], tile[1]


def _padded(x_RD: jax.Array, multiple: int) -> jax.Array:
    """Rows added up to a multiple of the tile; they belong to no group."""
    return jnp.pad(x_RD, ((0, -x_RD.shape[0] % multiple), (0, 0)))


def _tokamax(
    x: jax.Array,
    y: jax.Array,
    sizes_E: jax.Array,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    groups: tuple[list[int], list[int]],
    dtype: jnp.dtype,
) -> jax.Array:
    """tokamax's kernels by name: its own choice may fall back on XLA's dense product, E times the work.

    Columns are filled up with zeros to NARROWEST: its kernels for Hopper refuse fewer, which an adapter's rank may be.
    """
    import tokamax

    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contract, ((), ())), lhs_ragged_dimensions=groups[0], rhs_group_dimensions=groups[1]
    )

    def run(x: jax.Array, y: jax.Array, sizes_E: jax.Array) -> jax.Array:
        names = _implementations()
        return tokamax.ragged_dot_general(x, y, sizes_E, numbers, preferred_element_type=dtype, implementation=names)

    kept = [a.shape[d] for a, dims in ((x, contract[0]), (y, contract[1])) for d in range(1, a.ndim) if d not in dims]
    out = unchecked(run, _filled(x), _filled(y), sizes_E)
    return out[(..., *(slice(0, size) for size in kept))]


def _filled(a: jax.Array) -> jax.Array:
    """All dimensions but the first, rows or experts, as multiples of NARROWEST."""
    return jnp.pad(a, [(0, 0), *((0, -size % NARROWEST) for size in a.shape[1:])])


def _implementations() -> tuple[str, ...]:
    """0.0.17 has Triton's only beside jax-triton (the extra `cuda`), and refuses a name that it does not have."""
    from tokamax._src.ops.ragged_dot.api import IMPLEMENTATIONS

    return tuple(name for name in ("mosaic", "triton") if name == "mosaic" or name in IMPLEMENTATIONS)
