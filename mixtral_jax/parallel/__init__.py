"""The mesh, what lies where on it, and what devices say to each other."""

from mixtral_jax.parallel import compiler_quirks
from mixtral_jax.parallel.collectives import (
    Machine,
    assemble,
    axis_index,
    axis_max,
    axis_size,
    inside,
    machine,
    platform,
    psum,
    same_variance,
    shard_key,
    unchecked,
    variance,
    varying,
    zeros,
)
from mixtral_jax.parallel.compiler_quirks import take_chosen
from mixtral_jax.parallel.context import Part, gather_row, places, zigzag
from mixtral_jax.parallel.mesh import (
    BATCH_AXES,
    MESH_AXES,
    NEAREST_FIRST,
    TOKEN_AXES,
    MeshConfig,
    device_grid,
    make_mesh,
)
from mixtral_jax.parallel.sharding import (
    batch_sharding,
    batch_spec,
    drop_padding,
    gather,
    param_shardings,
    replicas,
    sharded,
    sum_replicas,
)
from mixtral_jax.parallel.whole import free_memory, gathered, host_memory, used_dtype
