"""Loading onto a mesh: every byte that this process's devices need is read once, whatever is split over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx

from mixtral_jax.checkpoint import save
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import files, hf2orbax, load, parts
from mixtral_jax.convert.models import place_leaf
from mixtral_jax.convert.pipeline import open_source
from mixtral_jax.convert.table import leaves
from mixtral_jax.model import abstract_model
from mixtral_jax.parallel import param_shardings
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from mixtral_jax.train.base import read_weights
from mixtral_jax.train.state import TrainState
from tests.convert.test_mistral import to_mistral, write_mistral
from tests.convert_files import TINY, load_params, random_tensors, write_hub

SHAPE = {
    **TINY, "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 16, "num_local_experts": 8,
}  # fmt: skip
MESHES = [{"data": 8}, {"fsdp": 8}, {"expert": 8}, {"tensor": 8}, {"fsdp": 2, "expert": 4}]
KINDS = ["hf", "mistral", "orbax", "step"]


def mesh_of(sizes):
    return make_mesh(MeshConfig(**{"data": 1, **sizes}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same weights in every format, and those weights."""
    place, tensors = tmp_path_factory.mktemp("parts"), random_tensors(SHAPE)
    write_hub(place / "hf", SHAPE, tensors)
    write_mistral(place / "mistral", SHAPE, to_mistral(tensors, SHAPE, merged=True), rope_theta=1e6)
    hf2orbax(place / "hf", place / "orbax", progress=False)
    want = load_params(place / "hf")
    config = {"model": MixtralConfig.from_hf(SHAPE).model_dump()}
    state = TrainState(jnp.asarray(1), jax.tree.map(jnp.asarray, want), {})
    save(place / "step", state, {"dataset": {}, "meta": {"config": config}})
    return place, want


@pytest.fixture
def taken(monkeypatch):
    """A function that gives the bytes read since it was called last."""
    seen, pread = [0], files.File.pread

    def counting(self, offset, size):
        seen[0] += size
        return pread(self, offset, size)

    monkeypatch.setattr(files.File, "pread", counting)
    before = 0

    def taken():
        nonlocal before
        (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        now = seen[0] + metric["values"][0]["value"]
        last, before = before, now
        return now - last

    taken()
    return taken


def assert_same(tree, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).view("u4"), b.view("u4")), tree, want)


@pytest.mark.parametrize("kind", KINDS)
def test_each_byte_is_read_once_on_every_mesh(place, taken, kind):
    (root, want), size = place, sum(x.nbytes for x in jax.tree.leaves(place[1]))
    for sizes in [None, *MESHES]:
        taken()
        model = load(root / kind, sizes and mesh_of(sizes))
        assert taken() <= 1.1 * size, sizes
        assert_same(nnx.to_pure_dict(nnx.state(model)), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_so_does_the_start_of_a_run(place, taken, kind, sizes):
    (root, want), size = place, sum(x.nbytes for x in jax.tree.leaves(place[1]))
    model = abstract_model(MixtralConfig.from_hf(SHAPE))
    shapes, places = nnx.to_pure_dict(nnx.state(model)), param_shardings(model, mesh_of(sizes))
    asked = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    taken()
    got = read_weights(str(root / kind), asked)
    assert taken() <= 1.1 * size
    assert_same(got, want)


@pytest.mark.parametrize(("axis", "path"), [("expert", "layers.moe.w2"), ("tensor", "layers.moe.w13")])
def test_a_process_reads_what_its_own_devices_need(place, taken, axis, path):
    source = open_source(place[0] / "hf")
    leaf = next(leaf for leaf in leaves(source.config) if leaf.path == path)
    whole = jax.tree_util.tree_reduce(lambda t, k: t[k], path.split("."), place[1])
    sharding = param_shardings(abstract_model(source.config), mesh_of({axis: 8}))["layers"]["moe"][path[11:]]
    indices = list(sharding.devices_indices_map(leaf.shape).values())
    own = [parts.edges(index, leaf.shape) for index in indices[2:5]]
    out = {box: np.full([b - a for a, b in box], np.nan, np.float32) for box in own}

    def take(box, at, values):
        out[box][tuple(slice(a, a + n) for a, n in zip(at, values.shape, strict=True))] = values

    taken()
    parts.read_parts(source, leaf, own, take)
    assert taken() == whole.nbytes * 3 // 8
    for box, values in out.items():
        np.testing.assert_array_equal(values, whole[tuple(slice(*edge) for edge in box)])


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 4, "fsdp": 2}], ids=str)
def test_an_accelerator_is_filled_in_place_by_one_matrix_at_a_time(place, monkeypatch, sizes):
    """CPUs are filled in the host's memory: here they are taken for accelerators."""
    monkeypatch.setattr(parts, "_on_host", lambda device: False)
    put, sizes_put = parts._put, []
    monkeypatch.setattr(parts, "_put", lambda out, value, at: sizes_put.append(value.nbytes) or put(out, value, at))
    source = open_source(place[0] / "hf")
    leaf = next(leaf for leaf in leaves(source.config) if leaf.path == "layers.moe.w13")
    mesh = mesh_of(sizes or {"fsdp": 8})
    sharding = sizes and param_shardings(abstract_model(source.config), mesh)["layers"]["moe"]["w13"]
    with jax.set_mesh(mesh):  # as a run does
        got = place_leaf(source, leaf, sharding, jnp.bfloat16)
    want = place[1]["layers"]["moe"]["w13"].astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16 and max(sizes_put) <= 2 * 128 * 128
    assert len(sizes_put) * max(sizes_put) == got.nbytes  # replicas are copied on the devices
    assert len(got.sharding.device_set) == (8 if sizes else 1)
    np.testing.assert_array_equal(np.asarray(got), want)
