"""A weight's gradient stays a reduce-scatter: equal in steps, and in the text that the TPU compiler makes of it."""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel import collectives
from mixtral_jax.parallel.collectives import gather_shards, innermost, is_cube, stages
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh


def test_rings_are_found_from_where_the_chips_stand():
    cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(2)]
    assert innermost(cube) == 2
    assert innermost([(x, y, 0) for x in range(16) for y in range(16)]) == 16
    assert innermost([(x, 0, 0) for x in range(4)]) == 1  # one ring: nothing to split
    assert innermost([]) == 1 and innermost([(0, 0, 0)]) == 1


def test_steps_written_out():
    assert stages(8, 1) == [None] and stages(8, 8) == [None]
    assert stages(8, 2) == [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]]


def test_a_cube_is_more_than_two_deep_in_three_dimensions():
    assert is_cube([(x, y, z) for x in range(4) for y in range(4) for z in range(4)])
    assert not is_cube([(x, y, z) for x in range(4) for y in range(4) for z in range(2)])
    assert not is_cube([(x, y, 0) for x in range(16) for y in range(16)]) and not is_cube([])


@pytest.mark.parametrize("cube", [False, True])  # gathered at once where shards are large, or in steps
@pytest.mark.parametrize("size", [8, 128])  # shards of one row, and of one tile
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(("sizes", "axes", "ring"), [
    ({"fsdp": 8}, ("fsdp",), 1), ({"fsdp": 8}, ("fsdp",), 2), ({"fsdp": 8}, ("fsdp",), 4),
    ({"fsdp": 2, "expert": 4}, ("fsdp", "expert"), 1), ({"fsdp": 4, "tensor": 2}, ("fsdp", "expert"), 1),
])  # fmt: skip
def test_gathering_and_its_gradient(monkeypatch, sizes, axes, ring, dim, size, cube):
    mesh = make_mesh(MeshConfig(data=1, **sizes))
    monkeypatch.setitem(collectives._RINGS, collectives._key(mesh.abstract_mesh), ring)
    if cube:
        monkeypatch.setattr(collectives, "_CUBES", {collectives._key(mesh.abstract_mesh)})
    monkeypatch.setattr(collectives, "SMALL_SHARD", 0)
    spec = P(*(axes if d == dim else None for d in range(3)))
    rng = np.random.default_rng(0)
    shape = tuple(size if d == dim else 8 for d in range(3))
    w, g = rng.standard_normal(shape, np.float32), rng.standard_normal((8, *shape), np.float32)

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, P(mesh.axis_names)), out_specs=(P(), spec))
    def both(w, g):
        other = tuple(a for a in mesh.axis_names if a not in jax.typeof(w).manual_axis_type.varying)
        whole, pull_back = jax.vjp(lambda w: gather_shards(jax.lax.pcast(w, other, to="varying"), axes, dim), w)
        return jax.lax.pmax(whole, mesh.axis_names), pull_back(g[0])[0]

    whole, gradient = jax.jit(both)(w, g)
    np.testing.assert_array_equal(whole, w)
    np.testing.assert_allclose(gradient, g.sum(axis=0), atol=1e-5)


def compile_for(topology, make, *shapes):
    """Text of `make(x, ...)` inside a shard_map on a slice that one axis fills; rows of all arrays are sharded."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra: aot)")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
    run = jax.shard_map(make, mesh=mesh, in_specs=(P("fsdp"),) * len(shapes), out_specs=P("fsdp"))
    rows = [(count * len(devices) if count < 8192 else count, columns) for count, columns in shapes]
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp"))) for s in rows]
    return jax.jit(run).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("topology", ["v5p:4x4x2", "v5e:16x16"])
def test_the_tpu_compiler_reduces_no_weight_to_every_chip(topology):
    """One axis fills the slice: as a single collective this compiles to an all-reduce of (8192, 1024)."""

    def gradient(x, dy, w):
        pull_back = jax.vjp(lambda w: x @ gather_shards(w, ("fsdp",), 0), w)[1]
        return pull_back(dy)[0]

    text = compile_for(topology, gradient, (512, 8192), (512, 1024), (8192, 1024))
    fused = len(re.findall(r"AllReduceScatterFusion", text)) + len(re.findall(r" reduce-scatter(?:-start)?\(", text))
    assert fused >= 2
    assert not re.findall(r"bf16\[8192,1024\]\S* all-reduce\(", text)


@pytest.mark.parametrize(("topology", "columns"), [("v5p:4x4x4", 1024), ("v5e:16x16", 256)])
def test_the_tpu_compiler_gathers_no_weight_by_an_all_reduce(topology, columns):
    """A cube, and small shards: as a single collective both compile to an all-reduce of the whole matrix."""
    text = compile_for(topology, lambda x, w: x @ gather_shards(w, ("fsdp",), 0), (512, 8192), (8192, columns))
    assert re.findall(r" all-gather(?:-start)?\(", text)
    assert not re.findall(rf"bf16\[8192,{columns}\]\S* all-reduce\(", text)
