"""A digest of weights: the same in every format and precision, another where a value is another."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.convert import arrays_identity, check_identity, hf2orbax, identity, load, open_source, weights_identity
from mixtral_jax.parallel import MeshConfig, make_mesh
from tests.convert_files import BF16, DENSE, TINY, fuse, random_tensors, write_hub

NAME = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize("whole", [1 << 29, 0], ids=["small", "large"])
def test_the_digest_is_of_the_values(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", whole)
    tensors = random_tensors(TINY, BF16)
    write_hub(tmp_path / "hf", TINY, tensors, shards=2)
    write_hub(tmp_path / "fused", TINY, fuse(tensors, TINY))
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", dtype="float32", progress=False)
    found = {weights_identity(open_source(tmp_path / name)) for name in ("hf", "fused", "orbax")}
    assert len(found) == 1
    moved = {name: tensor * BF16.type(1.01) for name, tensor in tensors.items()} if not whole else {**tensors}
    moved[NAME] = moved[NAME].copy()
    moved[NAME][3, 4] += BF16.type(1)
    source = open_source(write_hub(tmp_path / "moved", TINY, moved))
    noted = {"path": "runs/base", "step": 4, "digest": found.pop()}
    with pytest.raises(ValueError, match=f"here holds .* of runs/base at step 4 with digest {noted['digest']}"):
        check_identity(noted, source, "here")
    check_identity(noted | {"digest": None}, source, "here")
    check_identity(noted | {"digest": "0123456789abcdef01234567"}, source, "here")  # noted by an earlier version
    check_identity(None, source, "here")


MESHES = [None, {"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "expert": 4}]


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["experts", "dense"])
def test_the_digest_of_arrays_is_that_of_their_files_on_every_mesh(config, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "vocab_size": 48, "head_dim": 8, "num_key_value_heads": 2}
    path = write_hub(tmp_path / "hf", config | sizes, random_tensors(config | sizes, BF16))
    expected, params = weights_identity(open_source(path)), {}
    for axes in MESHES:
        if axes and config is DENSE and "expert" in axes:
            continue
        mesh = None if axes is None else make_mesh(MeshConfig(**({"data": 1, "fsdp": 1} | axes)))
        params = nnx.to_pure_dict(nnx.state(load(path, mesh=mesh, dtype="float32")))
        assert arrays_identity(params) == expected, axes
    for path, axis in (
        ("embed", 0),
        ("norm", 0),
    ):  # one bit, below what bfloat16 holds, in any leaf; two values swapped
        leaf = next(iter(params[path].values()))
        name = next(iter(params[path]))
        bits = np.array(leaf).view(np.uint32)
        bits[(-1,) * leaf.ndim] ^= 1
        assert arrays_identity(params | {path: {name: bits.view(np.float32)}}) != expected
        assert arrays_identity(params | {path: {name: np.roll(np.array(leaf), 1, axis)}}) != expected


def test_no_device_holds_a_whole_leaf_while_it_is_digested():
    """Nor a copy of its own part: each adds up what it has, and only sums travel."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    spec, shape = P(None, "expert", "fsdp", None, "tensor"), (4, 8, 64, 2, 128)
    leaf = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        program = identity._array_sums.lower({"layers.moe.w13": leaf}).compile()
    share = np.prod(shape) * 4 // 8
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == share and memory.temp_size_in_bytes < share / 100
    collectives = r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)"
    moved = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(collectives, program.as_text())]
    assert moved and max(moved) <= 8


@pytest.mark.parametrize("flip", [1 << 31, 1 << 30, 1 << 16, 3 << 30], ids=["sign", "exponent", "last of bf16", "two"])
def test_changes_of_two_values_do_not_cancel(flip):
    """A weak mixture forgets every sixteenth pair of signs, and so, now and then, that a matrix was negated."""
    bits, place = np.random.default_rng(0).integers(0, 1 << 32, (2, 2, 1 << 18)).astype(np.uint32)
    before, after = (identity._mixed(each, place) for each in (bits, bits ^ np.uint32(flip)))
    change = [np.sum(new - old, axis=0, dtype=np.uint32) for old, new in zip(before, after, strict=True)]
    assert not np.any((change[0] == 0) & (change[1] == 0))
    assert max(np.count_nonzero(each == 0) for each in change) <= 2  # of 2^18 pairs; chance gives one in 2^32
