"""Gathering a weight and its gradient, at once and in steps, and where the steps come from."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel.collectives import gather_shards
from mixtral_jax.parallel.compiler_quirks import innermost, is_cube, stages
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


HABITS = [name for name in vars(quirks) if name.endswith("ALL_REDUCE")]


@pytest.mark.parametrize("gathered", ["at once", "in steps", "without habits"])
@pytest.mark.parametrize("size", [8, 128])  # shards of one row, and of one tile
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(("sizes", "axes", "ring"), [
    ({"fsdp": 8}, ("fsdp",), 1), ({"fsdp": 8}, ("fsdp",), 2), ({"fsdp": 8}, ("fsdp",), 4),
    ({"fsdp": 2, "expert": 4}, ("fsdp", "expert"), 1), ({"fsdp": 4, "tensor": 2}, ("fsdp", "expert"), 1),
])  # fmt: skip
def test_gathering_and_its_gradient(monkeypatch, sizes, axes, ring, dim, size, gathered):
    mesh = make_mesh(MeshConfig(data=1, **sizes))
    monkeypatch.setitem(quirks._RINGS, quirks._key(mesh.abstract_mesh), ring)
    if gathered == "in steps":
        monkeypatch.setattr(quirks, "_CUBES", {quirks._key(mesh.abstract_mesh)})
    for name in HABITS if gathered == "without habits" else ():
        monkeypatch.setattr(quirks, name, quirks.Habit("jaxlib", "0.1", gone="0.2"))
    monkeypatch.setattr(quirks, "SMALL_SHARD", 0)
    spec = P(*(axes if d == dim else None for d in range(3)))
    rng = np.random.default_rng(0)
    shape = tuple(size if d == dim else 8 for d in range(3))
    w, g = rng.standard_normal(shape, np.float32), rng.standard_normal((8, *shape), np.float32)

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, P(mesh.axis_names)), out_specs=(P(), spec))
    def both(w, g):
        other = tuple(a for a in mesh.axis_names if a not in jax.typeof(w).manual_axis_type.varying)
        whole, pull_back = jax.vjp(
            lambda w: gather_shards(jax.lax.pcast(w, other, to="varying"), w.dtype, axes, dim), w
        )
        return jax.lax.pmax(whole, mesh.axis_names), pull_back(g[0])[0]

    whole, gradient = jax.jit(both)(w, g)
    np.testing.assert_array_equal(whole, w)
    np.testing.assert_allclose(gradient, g.sum(axis=0), atol=1e-5)
