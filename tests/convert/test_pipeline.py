"""Whole conversions: byte-exact both ways, what travels along, what is refused, what is left behind."""

import json
import os
import shutil

import fsspec
import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.convert import hf2orbax, orbax2hf
from mixtral_jax.convert.safetensors import split
from tests.convert_files import (
    BF16,
    DENSE,
    TINY,
    assert_same_bytes,
    fuse,
    load_params,
    random_tensors,
    read_hub,
    write_hub,
)

# NUMERICS B7: shapes that nothing divides.
GRID = {
    "top1_of_4": {**TINY, "num_experts_per_tok": 1},
    "top2_of_8": {**TINY, "num_local_experts": 8, "vocab_size": 131},
    "top4_of_16": {**TINY, "num_local_experts": 16, "num_experts_per_tok": 4, "rope_theta": 1e4},
    "all_of_3": {**TINY, "num_local_experts": 3, "num_experts_per_tok": 3},
    "one_kv_head": {**TINY, "num_key_value_heads": 1, "head_dim": 6},
    "kv_heads_as_heads": {**TINY, "num_key_value_heads": 4},
    "tied": {**TINY, "tie_word_embeddings": True},
    "dense": DENSE,
    "dense_window_tied": {**DENSE, "sliding_window": 16, "tie_word_embeddings": True},
}
DTYPES = {"bf16": BF16, "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", GRID.values(), ids=GRID.keys())
def test_round_trip_is_byte_exact(tmp_path, shape, dtype):
    tensors = random_tensors(shape, dtype)
    source = write_hub(tmp_path / "hf", shape, tensors, shards=3)
    hf2orbax(source, tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", progress=False)
    assert_same_bytes(read_hub(tmp_path / "back"), tensors)
    assert os.listdir(tmp_path / "back").count("model.safetensors") == 1
    # And the other direction: Orbax -> HF -> Orbax gives the same native arrays.
    hf2orbax(tmp_path / "back", tmp_path / "again", progress=False)
    first, second = load_params(tmp_path / "orbax"), load_params(tmp_path / "again")
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), first, second))


def test_fused_layout_comes_in_and_the_hub_layout_goes_out(tmp_path):
    tensors = random_tensors(TINY, BF16)
    write_hub(tmp_path / "fused", TINY, fuse(tensors, TINY))
    hf2orbax(tmp_path / "fused", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "hub", progress=False)
    assert_same_bytes(read_hub(tmp_path / "hub"), tensors)


def test_orbax_restores_what_was_written(tmp_path):
    """By Orbax itself, onto one device and onto a mesh of eight."""
    write_hub(tmp_path / "hf", TINY, random_tensors(TINY, BF16))
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    want = load_params(tmp_path / "hf")
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    by_expert = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))

    def place(leaf):
        sharding = by_expert if leaf.shape[:2] == (2, 4) else one
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    got = checkpoint.restore(tmp_path / "orbax" / "params", jax.tree.map(place, want))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), got, want))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_cast_where_asked(tmp_path, dtype):
    tensors = random_tensors(TINY, np.float32)
    write_hub(tmp_path / "hf", TINY, tensors)
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", dtype=dtype, progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", progress=False)
    target = DTYPES[{"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]]
    assert_same_bytes(read_hub(tmp_path / "back"), {n: t.astype(target) for n, t in tensors.items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    with pytest.raises(ValueError, match="dtype 'int8' is not known"):
        hf2orbax(tmp_path / "hf", tmp_path / "x", dtype="int8", progress=False)


def test_tensors_of_different_dtypes_keep_them_and_a_mixed_leaf_is_refused(tmp_path):
    tensors = random_tensors(TINY, BF16)
    mixed = {n: t.astype(np.float32) if "norm" in n or "gate" in n else t for n, t in tensors.items()}
    write_hub(tmp_path / "hf", TINY, mixed)
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", progress=False)
    assert_same_bytes(read_hub(tmp_path / "back"), mixed)
    name = "model.layers.1.self_attn.q_proj.weight"
    write_hub(tmp_path / "bad", TINY, {**tensors, name: tensors[name].astype(np.float32)})
    with pytest.raises(ValueError, match=f"{name} is float32, but other layers of layers.attention.query are bfloat16"):
        hf2orbax(tmp_path / "bad", tmp_path / "x", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["back", "bad", "hf", "orbax"]


def test_shards_index_and_header_are_those_of_the_hub(tmp_path):
    from huggingface_hub import split_state_dict_into_shards_factory

    tensors = random_tensors(TINY, BF16)
    write_hub(tmp_path / "hf", TINY, tensors)
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="8KB", progress=False)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert_same_bytes(read_hub(tmp_path / "back"), tensors)
    files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in files:
        data = (tmp_path / "back" / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
        assert {n for n, f in index["weight_map"].items() if f == file} == set(header)
    # The hub's own splitter puts the same tensors together, where none is larger than a shard.
    order = {n: tensors[n] for n in sorted(tensors, key=lambda n: list(index["weight_map"]).index(n))}
    theirs = split_state_dict_into_shards_factory(
        order, get_storage_size=lambda t: t.nbytes, filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda t: None, max_shard_size=8000,
    )  # fmt: skip
    ours = split([(n, t.dtype, t.shape) for n, t in order.items()], 8000)
    assert [[n for n, _, _ in shard] for shard in ours] == list(theirs.filename_to_tensors.values())


def test_what_belongs_to_the_model_travels_along(tmp_path):
    source = write_hub(tmp_path / "hf", {**TINY, "bos_token_id": 7, "note": "kept"}, random_tensors(TINY))
    side = {
        "tokenizer.json": b"{}", "tokenizer.model": b"\x00\x01", "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}", "chat_template.jinja": b"{{ x }}", "generation_config.json": b'{"a": 1}',
    }  # fmt: skip
    for name, content in side.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text("stays")
    hf2orbax(source, tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", progress=False)
    for directory in ("orbax", "back"):
        assert {n: (tmp_path / directory / n).read_bytes() for n in side} == side
        config = json.loads((tmp_path / directory / "config.json").read_text())
        assert config["note"] == "kept" and config["bos_token_id"] == 7
    assert sorted(os.listdir(tmp_path / "back")) == sorted([*side, "config.json", "model.safetensors"])


@pytest.mark.parametrize("version", [4, 5])
def test_config_of_both_transformers_versions(tmp_path, version):
    config = {k: v for k, v in TINY.items() if k not in ("rope_theta", "torch_dtype")}
    if version == 4:
        config |= {"rope_theta": 12345.0, "torch_dtype": "float32"}
    else:
        config |= {"rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"}, "dtype": "float32"}
    write_hub(tmp_path / "hf", config, random_tensors(TINY))
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", progress=False)
    out = json.loads((tmp_path / "back" / "config.json").read_text())
    assert out["rope_theta"] == out["rope_parameters"]["rope_theta"] == 12345.0
    assert out["dtype"] == out["torch_dtype"] == "float32"


def test_remote_directories_on_the_safetensors_side(tmp_path):
    tensors = random_tensors(TINY, BF16)
    source = write_hub(tmp_path / "hf", TINY, tensors, shards=2)
    (source / "tokenizer.json").write_text("{}")
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/models/hf", recursive=True)
    hf2orbax("memory://models/hf", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", "memory://models/back", max_shard_size="8KB", progress=False)
    with pytest.raises(FileExistsError, match="exists already"):
        orbax2hf(tmp_path / "orbax", "memory://models/back", progress=False)
    memory.get("/models/back", str(tmp_path / "back"), recursive=True)
    assert_same_bytes(read_hub(tmp_path / "back"), tensors)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match="an Orbax checkpoint is written to a local disk only"):
        hf2orbax(source, "memory://models/orbax", progress=False)
    with pytest.raises(ValueError, match="streamed from local disks only"):
        orbax2hf("memory://models/orbax", tmp_path / "x", progress=False)
    memory.rm("/models", recursive=True)


def test_an_existing_destination_is_refused_and_replaced_by_force(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="--force replaces it"):
        hf2orbax(source, tmp_path / "dst", progress=False)
    assert os.listdir(tmp_path / "dst") == ["mine"]
    hf2orbax(source, tmp_path / "dst", force=True, progress=False)
    assert sorted(os.listdir(tmp_path / "dst")) == ["config.json", "params"]
    assert sorted(os.listdir(tmp_path)) == ["dst", "hf"]
    with pytest.raises(ValueError, match="overlap"):
        hf2orbax(source, source / "inside", progress=False)


@pytest.mark.parametrize("value, word", [(np.nan, "NaN"), (np.inf, "infinity")])
def test_values_that_are_not_finite_are_named(tmp_path, value, word):
    tensors = random_tensors(TINY, BF16)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][3, 5] = value
    write_hub(tmp_path / "hf", TINY, tensors)
    with pytest.warns(UserWarning, match=f"1 tensors hold values that are not finite: {name} \\({word}\\)"):
        hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    assert (tmp_path / "orbax" / "config.json").exists()


def test_overflow_in_a_cast_is_named(tmp_path):
    tensors = random_tensors(TINY, np.float32)
    tensors["lm_head.weight"][0, 0] = 1e6
    write_hub(tmp_path / "hf", TINY, tensors)
    with pytest.warns(UserWarning, match=r"lm_head.weight \(infinity\)"):
        hf2orbax(tmp_path / "hf", tmp_path / "orbax", dtype="float16", progress=False)


def test_too_little_disk_space_is_said_before_starting(tmp_path, monkeypatch):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"not enough disk space .* are needed, 0.0 GB are free"):
        hf2orbax(source, tmp_path / "orbax", progress=False)
    assert os.listdir(tmp_path) == ["hf"]


def test_wrong_kind_of_source_is_named(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    hf2orbax(source, tmp_path / "orbax", progress=False)
    with pytest.raises(ValueError, match="is an Orbax checkpoint, not a Hugging Face directory: use orbax2hf"):
        hf2orbax(tmp_path / "orbax", tmp_path / "x", progress=False)
    with pytest.raises(ValueError, match="is no Orbax model directory"):
        orbax2hf(source, tmp_path / "x", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        orbax2hf(tmp_path / "nowhere", tmp_path / "x", progress=False)
    with pytest.raises(ValueError, match="max_shard_size 'big' is no size"):
        orbax2hf(tmp_path / "orbax", tmp_path / "x", max_shard_size="big", progress=False)


def test_progress_is_said_in_plain_lines_off_a_terminal(tmp_path, capsys):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    hf2orbax(source, tmp_path / "orbax")
    said = capsys.readouterr().err
    assert "MB/s" in said and "s left" in said
    orbax2hf(tmp_path / "orbax", tmp_path / "back", dtype="bfloat16")
    total = 2 * sum(t.size for t in random_tensors(TINY).values())
    assert f"{total:,} bytes of weights in bfloat16" in capsys.readouterr().err
