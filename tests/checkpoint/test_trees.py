"""Trees of arrays to disk and back: bit for bit, onto other meshes, in chunks; damage and refusals."""

import json
import math
import os
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.checkpoint import pieces
from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.checkpoint.pieces import HELD, Runs, piece_shape
from mixtral_jax.checkpoint.slices import ArrayReader
from mixtral_jax.config import MixtralConfig
from mixtral_jax.model import abstract_model
from mixtral_jax.parallel import MESH_AXES, param_shardings


def tree():
    key = jax.random.key(0)
    return {
        "params": {"w2": jax.random.normal(key, (2, 4, 8, 6)), "scale": jnp.ones(5, jnp.bfloat16)},
        "moments": ({"count": jnp.int32(3)}, jax.random.normal(key, (8, 4))),
    }


def abstract(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "7"
    size = checkpoint.save(path, tree(), {"meta": {"step": 7, "nothing": None}})
    assert size == sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name != checkpoint.FILES)
    return path


def test_a_relative_path_reads_the_same(saved, monkeypatch):
    """Orbax by itself finds nothing below one, and says nothing."""
    monkeypatch.chdir(saved.parent)
    assert_same(checkpoint.restore(saved.name, abstract(tree())), tree())
    assert checkpoint.read_item(saved.name, "meta") == {"step": 7, "nothing": None}
    assert checkpoint.tree_shapes(saved.name) == checkpoint.tree_shapes(saved)
    assert sorted(ArrayReader(Path(saved.name)).names) == sorted(checkpoint.tree_shapes(saved))


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "7")


def test_what_was_saved_comes_back_bit_for_bit(saved):
    assert_same(checkpoint.restore(saved, abstract(tree())), tree())
    assert checkpoint.read_item(saved, "meta") == {"step": 7, "nothing": None}
    assert checkpoint.damage(saved) is None


def test_whoever_has_no_name_on_this_machine_sees_what_is_whole(copy, monkeypatch):
    """A container may have any user id: epath looks the owner's name up, and found none."""

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert checkpoint.damage(copy) is None and checkpoint.list_files(copy) > 0
    assert checkpoint.is_there(checkpoint.epath.Path(copy), directory=True)


def test_a_part_that_gives_up_late_leaves_what_a_later_attempt_writes(tmp_path):
    class Response:
        def result(self):
            (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
            raise TimeoutError("a barrier")

    pending = checkpoint.PendingSave(checkpoint.epath.Path(tmp_path / "7"), Response(), checkpoint._context())
    pending.left_behind = True
    for left in (["7.orbax-checkpoint-tmp"], []):
        with pytest.raises(TimeoutError):
            pending.result()
        assert [p.name for p in tmp_path.iterdir()] == left
        pending.left_behind = False
        shutil.rmtree(tmp_path / "7.orbax-checkpoint-tmp", ignore_errors=True)


def test_shapes_are_known_without_reading(saved):
    assert checkpoint.tree_shapes(saved) == {
        "params.w2": ((2, 4, 8, 6), "float32"),
        "params.scale": ((5,), "bfloat16"),
        "moments.0.count": ((), "int32"),
        "moments.1": ((8, 4), "float32"),
    }


def pieces_of(path, name):
    import tensorstore as ts

    kvstore = {"driver": "ocdbt", "base": f"file://{path}/state/", "path": f"{name}/"}
    return ts.open({"driver": "zarr3", "kvstore": kvstore}).result().chunk_layout.read_chunk.shape


def test_stacks_are_cut_by_their_names_into_pieces_of_a_size(tmp_path, monkeypatch):
    """Four dimensions alone say nothing: a layer of attention has them too, and came out in pieces of one head."""
    monkeypatch.setattr(pieces, "PIECE", 1024)
    experts = {"w13": (2, 4, 16, 2, 16), "w2": (2, 4, 16, 8), "w1_lora": {"a": (2, 4, 16, 16)}}
    layers = {"attention": {"query": (4, 8, 2, 16), "key": (4, 8, 1, 8)}, "moe": experts, "moe_norm": {"scale": (4, 8)}}
    shapes = {"params": {"embed": {"weight": (40, 16)}, "layers": layers}, "moments": ({"mu": {"layers": layers}},)}
    checkpoint.save(
        tmp_path / "1", jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int))
    )
    want = {
        "attention.query": (1, 8, 2, 16), "attention.key": (4, 8, 1, 8), "moe_norm.scale": (4, 8),
        "moe.w13": (1, 1, 16, 1, 16), "moe.w2": (1, 2, 16, 8), "moe.w1_lora.a": (1, 1, 16, 16),
    }  # fmt: skip
    for tree in ("params", "moments.0.mu"):
        assert {name: pieces_of(tmp_path / "1", f"{tree}.layers.{name}") for name in want} == want
    assert pieces_of(tmp_path / "1", "params.embed.weight") == (40, 16)


@pytest.mark.parametrize(("fsdp", "most", "least"), [(1, 1000, 2**24), (8, 7000, 2**24), (64, 40_000, 2**21)])
def test_a_tree_of_8x7b_is_in_pieces_neither_small_nor_unbounded(fsdp, most, least):
    """By ndim >= 4 they were 394,000, of which 4 in 5 had 16 KB or less."""
    model = abstract_model(MixtralConfig.preset("mixtral-8x7b"))
    mesh = jax.sharding.AbstractMesh((1, fsdp, 1, 1, 1), MESH_AXES)
    places, shapes = param_shardings(model, mesh), nnx.to_pure_dict(nnx.state(model))
    tree, count = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places), 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        cut, part = checkpoint._chunks(path, leaf).shard_axes or (), leaf.sharding.shard_shape(leaf.shape)
        piece = piece_shape(part, 4, cut, leaf.shape)
        count += leaf.size // math.prod(piece)
        together = [piece[axis] if axis in cut else n for axis, n in enumerate(leaf.shape)]
        assert 4 * math.prod(together) <= HELD or not cut
        assert 4 * math.prod(piece) >= least or piece == part
    assert count <= most


def test_the_private_function_of_orbax_is_asked_for_our_leaves_alone():
    """Orbax cuts by itself where a leaf asks for no runs; when it can cut in runs, checkpoint/pieces.py may go."""
    from orbax.checkpoint._src.arrays.subchunking import choose_chunk_shape

    own = ((8, 16, 4), (8, 16, 4), np.dtype("float32"), 1024)
    assert choose_chunk_shape(*own, shard_axes=(0,)) == (1, 16, 4)
    assert choose_chunk_shape(*own, shard_axes=Runs((0,))) == (8, 16, 4)


def test_a_sharded_tree_comes_back_on_another_mesh(tmp_path):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    there = jax.device_put(tree(), NamedSharding(mesh, P()))
    there["params"]["w2"] = jax.device_put(there["params"]["w2"], NamedSharding(mesh, P(None, "b", "a")))
    checkpoint.save(tmp_path / "1", there)
    want = abstract(tree(), NamedSharding(mesh, P()))
    want["params"]["w2"] = jax.ShapeDtypeStruct(
        (2, 4, 8, 6), jnp.float32, sharding=NamedSharding(mesh, P("a", None, "b"))
    )
    back = checkpoint.restore(tmp_path / "1", want)
    assert back["params"]["w2"].sharding.spec == P("a", None, "b")
    assert_same(back, tree())


def test_a_part_can_be_read_alone_and_cast(saved):
    want = {"params": {"w2": jax.ShapeDtypeStruct((2, 4, 8, 6), jnp.bfloat16)}}
    part = checkpoint.restore(saved, abstract(want), partial=True)
    assert_same(part, {"params": {"w2": tree()["params"]["w2"].astype(jnp.bfloat16)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["params"].update(w2=jnp.zeros((2, 4, 8, 5))), r"params\.w2 has shape \(2, 4, 8, 6\) .*, 8, 5\)"),
        (lambda t: t["params"].update(more=jnp.zeros(3)), r"has no params\.more, which the model needs .* \(3,\)"),
        (lambda t: t["params"].pop("scale"), r"has params\.scale, which the model does not have"),
    ],
)  # fmt: skip
def test_another_shape_is_an_error_that_names_the_leaf(saved, change, message):
    wanted = tree()
    change(wanted)
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(saved, abstract(wanted))


def test_a_save_in_the_background_is_not_changed_by_what_happens_next(tmp_path):
    state = tree()
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    pending = checkpoint.save_async(tmp_path / "1", state)
    for _ in range(20):
        state = step(state)
    pending.result()
    assert_same(checkpoint.restore(tmp_path / "1", abstract(tree())), tree())


def biggest_file(path):
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_a_truncated_file_is_noticed(copy):
    file = biggest_file(copy)
    size = file.stat().st_size
    os.truncate(file, size // 2)
    assert checkpoint.damage(copy) == f"{file.relative_to(copy)} has {size // 2} of {size} bytes"


def test_a_missing_file_is_noticed(copy):
    file = biggest_file(copy)
    file.unlink()
    assert checkpoint.damage(copy) == f"{file.relative_to(copy)} is missing"


def test_without_the_commit_marker_it_is_not_complete(copy):
    (copy / checkpoint.COMMIT).unlink()
    assert checkpoint.damage(copy) == "commit_success.txt is missing"


def test_a_list_of_files_that_cannot_be_read_is_damage(copy):
    (copy / checkpoint.FILES).write_text("{")
    assert checkpoint.damage(copy) == "files.json is not readable"


def test_a_process_killed_after_the_commit_leaves_a_whole_checkpoint(copy):
    (copy / checkpoint.FILES).unlink()
    assert checkpoint.damage(copy) is None


def test_the_list_of_files_names_every_file(saved):
    listed = json.loads((saved / checkpoint.FILES).read_text())
    assert {name: (saved / name).stat().st_size for name in listed} == listed
    assert checkpoint.COMMIT in listed


@pytest.fixture
def small_files_only():
    """The system refuses to write more than 64 KiB into a file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_a_refused_write_is_an_error_of_the_system_and_leaves_nothing(small_files_only, tmp_path):
    large = {"w": jax.random.normal(jax.random.key(0), (2**18,))}
    with pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path / "1", large)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_save_go_and_the_finished_stay(copy):
    leftover = copy.parent / "7.orbax-checkpoint-tmp-123"
    leftover.mkdir()
    checkpoint.discard_unfinished(copy)
    assert copy.exists() and not leftover.exists()
