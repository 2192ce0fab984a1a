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

from mixtral_jax import collectives
from mixtral_jax.collectives import gather_shards, innermost, stages
from mixtral_jax.mesh import MeshConfig, make_mesh


def test_rings_are_found_from_where_the_chips_stand():
    cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(2)]
    assert innermost(cube) == 2
    assert innermost([(x, y, 0) for x in range(16) for y in range(16)]) == 16
    assert innermost([(x, 0, 0) for x in range(4)]) == 1  # one ring: nothing to split
    assert innermost([]) == 1 and innermost([(0, 0, 0)]) == 1


def test_steps_written_out():
    assert stages(8, 1) == [None] and stages(8, 8) == [None]
    assert stages(8, 2) == [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(("sizes", "axes", "ring"), [
    ({"fsdp": 8}, ("fsdp",), 1), ({"fsdp": 8}, ("fsdp",), 2), ({"fsdp": 8}, ("fsdp",), 4),
    ({"fsdp": 2, "expert": 4}, ("fsdp", "expert"), 1), ({"fsdp": 4, "tensor": 2}, ("fsdp", "expert"), 1),
])  # fmt: skip
def test_gathering_and_its_gradient(monkeypatch, sizes, axes, ring, dim):
    mesh = make_mesh(MeshConfig(data=1, **sizes))
    monkeypatch.setitem(collectives._RINGS, collectives._key(mesh.abstract_mesh), ring)
    spec = P(*(axes if d == dim else None for d in range(3)))
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((8, 8, 16), np.float32), rng.standard_normal((8, 8, 8, 16), np.float32)

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, P(mesh.axis_names)), out_specs=(P(), spec))
    def both(w, g):
        other = tuple(a for a in mesh.axis_names if a not in jax.typeof(w).manual_axis_type.varying)
        whole, pull_back = jax.vjp(lambda w: gather_shards(jax.lax.pcast(w, other, to="varying"), axes, dim), w)
        return jax.lax.pmax(whole, mesh.axis_names), pull_back(g[0])[0]

    whole, gradient = jax.jit(both)(w, g)
    np.testing.assert_array_equal(whole, w)
    np.testing.assert_allclose(gradient, g.sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("topology", ["v5p:4x4x2", "v5e:16x16"])
def test_the_tpu_compiler_reduces_no_weight_to_every_chip(topology):
    """One axis fills the slice: as a single collective this compiles to an all-reduce of (8192, 1024)."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu (extra: aot)")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
    rows, stored = P("fsdp"), P("fsdp", None)

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, stored), out_specs=stored)
    def gradient(x, dy, w):
        pull_back = jax.vjp(lambda w: x @ gather_shards(w, ("fsdp",), 0), w)[1]
        return pull_back(dy)[0]

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    tokens = 512 * len(devices)
    arguments = (array((tokens, 8192), rows), array((tokens, 1024), rows), array((8192, 1024), stored))
    text = jax.jit(gradient).lower(*arguments).compile().as_text()
    fused = len(re.findall(r"AllReduceScatterFusion", text)) + len(re.findall(r" reduce-scatter(?:-start)?\(", text))
    assert fused >= 2
    assert not re.findall(r"bf16\[8192,1024\]\S* all-reduce\(", text)
