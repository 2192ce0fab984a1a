"""The mesh and the placement of every parameter: golden tables, and errors that say what to change."""

import itertools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import PRESETS, MixtralConfig
from mixtral_jax.model import abstract_model
from mixtral_jax.parallel import sharding
from mixtral_jax.parallel.mesh import MESH_AXES, MeshConfig, device_grid, make_mesh
from mixtral_jax.parallel.sharding import param_spec, param_specs

BOTH = ("fsdp", "expert")

# The place of every leaf, whatever the sizes of the mesh.
SPECS = {
    "embed.weight": P(("tensor",), BOTH),
    "layers.attention_norm.scale": P(None, None),
    "layers.attention.query": P(None, BOTH, ("tensor",), None),
    "layers.attention.key": P(None, BOTH, ("tensor",), None),
    "layers.attention.value": P(None, BOTH, ("tensor",), None),
    "layers.attention.output": P(None, ("tensor",), None, BOTH),
    "layers.moe_norm.scale": P(None, None),
    "layers.moe.router": P(None, BOTH, None),
    "layers.moe.w13": P(None, ("expert",), ("fsdp",), None, ("tensor",)),
    "layers.moe.w2": P(None, ("expert",), ("tensor",), ("fsdp",)),
    "norm.scale": P(None),
    "head.weight": P(BOTH, ("tensor",)),
}

# preset -> mesh -> what one device holds of embed.weight, attention.query, attention.key, moe.w13 and moe.w2
LOCAL = {
    "tiny": {
        (("data", 8),): [(4096, 192), (4, 192, 6, 32), (4, 192, 2, 32), (4, 8, 192, 2, 384), (4, 8, 384, 192)],
        (("expert", 4), ("tensor", 2)): [
            (2048, 48), (4, 48, 3, 32), (4, 48, 1, 32), (4, 2, 192, 2, 192), (4, 2, 192, 192)],
    },
    "mistral-7b": {
        (("fsdp", 8),): [
            (32000, 512), (32, 512, 32, 128), (32, 512, 8, 128), (32, 1, 512, 2, 14336), (32, 1, 14336, 512)],
    },
    "mixtral-8x7b": {
        (("fsdp", 32),): [
            (32000, 128), (32, 128, 32, 128), (32, 128, 8, 128), (32, 8, 128, 2, 14336), (32, 8, 14336, 128)],
        (("fsdp", 4), ("expert", 8)): [
            (32000, 128), (32, 128, 32, 128), (32, 128, 8, 128), (32, 1, 1024, 2, 14336), (32, 1, 14336, 1024)],
        (("fsdp", 16), ("context", 4)): [
            (32000, 256), (32, 256, 32, 128), (32, 256, 8, 128), (32, 8, 256, 2, 14336), (32, 8, 14336, 256)],
    },
    "mixtral-8x22b": {
        (("fsdp", 256),): [
            (32000, 24), (56, 24, 48, 128), (56, 24, 8, 128), (56, 8, 24, 2, 16384), (56, 8, 16384, 24)],
        (("data", 2), ("fsdp", 4), ("expert", 8), ("tensor", 4)): [
            (8000, 192), (56, 192, 12, 128), (56, 192, 2, 128), (56, 1, 1536, 2, 4096), (56, 1, 4096, 1536)],
    },
}  # fmt: skip
LEAVES = ("embed.weight", "layers.attention.query", "layers.attention.key", "layers.moe.w13", "layers.moe.w2")


def fake_mesh(**sizes):
    """Only the sizes: placement needs no devices."""
    return SimpleNamespace(shape=dict.fromkeys(MESH_AXES, 1) | sizes)


def leaves(model):
    return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}


def specs_of(model, mesh):
    specs, _ = param_specs(model, mesh)
    flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    return dict(zip(leaves(model), flat, strict=True))


def local_shape(shape, spec, mesh):
    names = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
    parts = [int(np.prod([mesh.shape[a] for a in axes])) for axes in names]
    return tuple(n // p for n, p in zip(shape, parts, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_leaf_of_every_preset_has_the_place_of_the_table(preset):
    model = abstract_model(MixtralConfig.preset(preset))
    want = {k: v for k, v in SPECS.items() if k != "layers.moe.router" or preset != "mistral-7b"}
    assert specs_of(model, fake_mesh()) == want


@pytest.mark.parametrize(("preset", "sizes"), [(p, m) for p, meshes in LOCAL.items() for m in meshes])
def test_what_one_device_holds(preset, sizes):
    model, mesh = abstract_model(MixtralConfig.preset(preset)), fake_mesh(**dict(sizes))
    specs, shapes = specs_of(model, mesh), {k: v.shape for k, v in leaves(model).items()}
    assert [local_shape(shapes[k], specs[k], mesh) for k in LEAVES] == LOCAL[preset][sizes]


def test_matrices_are_divided_by_every_axis_that_stores_parameters():
    """ZeRO-3: a device holds 1 / (fsdp x expert x tensor) of all but the norms; the router is whole along tensor."""
    model, mesh = abstract_model(MixtralConfig.preset("mixtral-8x7b")), fake_mesh(fsdp=8, expert=4, tensor=2, data=3)
    specs = specs_of(model, mesh)
    for name, leaf in leaves(model).items():
        share = leaf.size // int(np.prod(local_shape(leaf.shape, specs[name], mesh)))
        assert share == (1 if "scale" in name else 32 if "router" in name else 64), name


def test_real_arrays_land_where_the_table_says():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    model = abstract_model(MixtralConfig.preset("tiny"))
    shardings = sharding.param_shardings(model, mesh)
    w13 = jax.device_put(np.zeros((4, 8, 192, 2, 384), np.float32), shardings["layers"]["moe"]["w13"])
    assert {s.data.shape for s in w13.addressable_shards} == {(4, 4, 96, 2, 192)}
    assert sharding.param_shardings(model, None) is None
    assert sharding.batch_sharding(None) is None
    assert sharding.batch_sharding(mesh).spec == P(None, ("data", "fsdp", "expert"), "context")


def test_one_free_axis_takes_what_is_left():
    assert MeshConfig(fsdp=2).sizes(8) == {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1, "context": 1}
    assert MeshConfig(data=1, fsdp=-1, expert=4).sizes(8)["fsdp"] == 2
    assert MeshConfig(data=1, fsdp=-1, dcn_data=2).sizes(8) == dict(data=2, fsdp=4, expert=1, tensor=1, context=1)
    assert make_mesh(MeshConfig(), jax.devices()[:1]) is None
    assert dict(make_mesh(MeshConfig(expert=4)).shape)["data"] == 2


def test_the_first_axes_are_the_outermost():
    """Rows of a batch shard lie together, so that one process reads contiguous rows."""
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 2, 2)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))


INNERMOST_FIRST = ("tensor", "expert", "context", "fsdp", "data")


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("per_node", [4, 8])
def test_an_axis_leaves_a_node_only_where_it_and_those_inside_it_are_larger(nodes, per_node):
    """Every mesh of powers of two."""
    devices = fake_devices(nodes * per_node, per_process=per_node, platform="gpu")
    powers = [2**n for n in range(6)]
    shapes = [s for s in itertools.product(powers, repeat=4) if len(devices) % math.prod(s) == 0]
    for shape in shapes:
        sizes = dict(zip(INNERMOST_FIRST, shape, strict=False))
        grid = device_grid(MeshConfig(**sizes), devices)
        assert sorted(ids(grid).flat) == list(range(len(devices)))
        nodes_of = np.vectorize(lambda d: d.process_index)(grid)
        sizes["data"] = len(devices) // math.prod(shape)
        inner = 1
        for axis in INNERMOST_FIRST:
            inner *= sizes[axis]
            along = np.moveaxis(nodes_of, MESH_AXES.index(axis), 0)
            assert (along != along[:1]).any() == (sizes[axis] > 1 and inner > per_node), (sizes, axis)


def test_tensor_groups_stay_on_a_node_of_gpus():
    grid = device_grid(MeshConfig(data=1, tensor=8, context=2), fake_devices(16, per_process=8, platform="gpu"))
    np.testing.assert_array_equal(ids(grid), np.arange(16).reshape(2, 8).T)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["data 3 x fsdp 1", "= 3 devices", "there are 8"]),
        ({"expert": 3}, ["8 devices", "multiple of 3"]),
        ({"data": 2, "fsdp": 2, "dcn_data": 4}, ["dcn_data 4", "= 16 devices", "there are 8"]),
    ],
)
def test_a_mesh_that_is_not_the_number_of_devices(sizes, words):
    with pytest.raises(ValueError) as error:
        make_mesh(MeshConfig(**sizes))
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"fsdp": -1}, "more than one mesh axis is -1: data, fsdp"),
        ({"tensor": 0}, "mesh.tensor is 0"),
        ({"tensor": -2}, "mesh.tensor is -2"),
        ({"dcn_data": 0}, "greater than 0"),
        ({"model": 2}, "Extra inputs"),
    ],
)
def test_sizes_that_cannot_be(sizes, text):
    with pytest.raises(ValueError, match=text):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"expert": 3}, ["layers.moe.w13", "experts dimension 8", "multiple of 3", "smaller mesh.expert"]),
        ({"tensor": 4}, ["layers.attention.key", "kv_heads dimension 2", "multiple of 4", "smaller mesh.tensor"]),
        ({"fsdp": 5}, ["embed.weight", "embed dimension 192", "fsdp 5 x expert 1", "smaller mesh.fsdp or pad"]),
    ],
)
def test_a_dimension_that_an_axis_does_not_divide_is_named_with_numbers_and_remedy(sizes, words):
    with pytest.raises(ValueError) as error:
        param_specs(abstract_model(MixtralConfig.preset("tiny")), fake_mesh(**sizes))
    assert all(w in str(error.value) for w in words), error.value


def test_an_axis_without_a_rule_and_an_axis_used_twice_are_errors(monkeypatch):
    mesh_shape = fake_mesh(fsdp=2).shape
    with pytest.raises(ValueError, match=r"extra.weight: logical axis 'colour' has no rule"):
        param_spec(("embed", "colour"), (4, 4), mesh_shape, "extra.weight")
    with pytest.raises(ValueError, match=r"extra.weight: two of its axes \(embed, expert_embed\) .*fsdp"):
        param_spec(("embed", "expert_embed"), (4, 4), mesh_shape, "extra.weight")
    with pytest.raises(ValueError, match=r"extra.weight has 2 dimensions but 1 logical axes: embed"):
        param_spec(("embed",), (4, 4), mesh_shape, "extra.weight")


# ---- slices and nodes outside the fast network -----------------------------------------------------------------------


def fake_devices(count, per_slice=None, per_process=1, platform="cpu"):
    """In an order that no rule may rely on but that of their numbers inside a group."""
    made = [
        SimpleNamespace(id=i, platform=platform, process_index=i // per_process, slice_index=i // (per_slice or count))
        for i in range(count)
    ]
    return made[count // 2 :] + made[: count // 2]


def ids(grid):
    return np.vectorize(lambda d: d.id)(grid).squeeze()


def test_slices_are_the_slowest_part_of_data():
    """16 devices in 4 slices of two processes: each slice has its own index along data, and fsdp lies inside it."""
    grid = device_grid(MeshConfig(data=1, fsdp=4, dcn_data=4), fake_devices(16, per_slice=4, per_process=2))
    assert grid.shape == (4, 4, 1, 1, 1)
    np.testing.assert_array_equal(ids(grid), np.arange(16).reshape(4, 4))


def test_slices_along_data_and_fsdp_and_replicas_inside_a_slice():
    config = MeshConfig(data=2, fsdp=2, expert=2, dcn_data=2, dcn_fsdp=2)
    grid = ids(device_grid(config, fake_devices(32, per_slice=8)))
    assert grid.shape == (4, 4, 2)  # data 2 x 2, fsdp 2 x 2, expert 2
    slices = grid // 8
    for data in range(4):
        for fsdp in range(4):
            assert set(slices[data, fsdp]) == {data // 2 * 2 + fsdp // 2}  # the outer half of each index
    np.testing.assert_array_equal(grid[:2, :2], np.arange(8).reshape(2, 2, 2))


def test_without_slices_nodes_are_runs_of_processes():
    """Two nodes of two processes with two devices each."""
    grid = device_grid(MeshConfig(data=1, expert=4, dcn_data=2), fake_devices(8, per_process=2))
    np.testing.assert_array_equal(ids(grid), np.arange(8).reshape(2, 4))


@pytest.mark.parametrize(
    ("sizes", "devices", "words"),
    [
        (dict(fsdp=4, dcn_data=2), dict(count=16, per_slice=4), ["dcn_data 2 x dcn_fsdp 1 = 2", "4 slices", "data 4"]),
        (dict(fsdp=4, dcn_data=4), dict(count=16, per_slice=8), ["= 4 groups", "2 slices", "dcn_data 2"]),
        (dict(fsdp=2, dcn_fsdp=3), dict(count=12, per_process=3), ["dcn_fsdp 3 = 3", "4 processes"]),
        (dict(fsdp=2, dcn_data=2), dict(count=16, per_process=16), ["= 2 groups", "1 processes", "or 1 where"]),
        (dict(fsdp=2, dcn_data=3), dict(count=8, per_slice=3), ["8 devices are not a multiple of 6"]),
        (dict(fsdp=2, dcn_data=2), dict(count=8, per_slice=5), ["every slice", "5, 3"]),
    ],
)  # fmt: skip
def test_slices_that_do_not_divide_are_named(sizes, devices, words):
    with pytest.raises(ValueError) as error:
        device_grid(MeshConfig(**sizes), fake_devices(**devices))
    assert all(w in str(error.value) for w in words), error.value
