"""Orbax checkpoints that are not ours or not whole, and the checkpoints of training runs."""

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.checkpoint import pieces
from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import hf2orbax, load, orbax2hf, stream
from mixtral_jax.convert import orbax as orbax_files
from mixtral_jax.convert.orbax import OrbaxSource
from tests.convert_files import BF16, TINY, assert_same_bytes, load_params, random_tensors, read_hub, write_hub
from tests.prepared import MODEL, TOKENIZER


@pytest.fixture
def orbax(tmp_path):
    write_hub(tmp_path / "hf", TINY, random_tensors(TINY, BF16))
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    return tmp_path / "orbax"


def refused(orbax, match):
    with pytest.raises(ValueError, match=match) as error:
        orbax2hf(orbax, orbax.parent / "back", progress=False)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(orbax.parent)) == ["hf", "orbax"]


def test_a_checkpoint_of_somebody_else(orbax):
    shutil.rmtree(orbax / "params")
    tree = {"w": np.zeros((2, 3), np.float32)}
    checkpoint.save(orbax / "params", tree)
    refused(orbax, r"does not match its config.json: missing tensors 12 .*; unexpected 1 \(w\)")
    meta = orbax / "params" / "_CHECKPOINT_METADATA"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "custom_metadata": {"theirs": 1}}))
    (orbax / "params" / "files.json").unlink()
    refused(orbax, "is an Orbax checkpoint but not one of ours: format 1 expected, None found")


def test_an_incomplete_checkpoint(orbax):
    data = sorted((orbax / "params" / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    content = data[-1].read_bytes()
    data[-1].write_bytes(content[:-5])
    refused(orbax, r"is no complete Orbax checkpoint: state/d/\w+ has \d+ of \d+ bytes")
    data[-1].unlink()
    refused(orbax, r"is no complete Orbax checkpoint: state/d/\w+ is missing")
    (orbax / "params" / "files.json").unlink()
    (orbax / "params" / "state" / "manifest.ocdbt").unlink()
    refused(orbax, "manifest.ocdbt is missing")
    (orbax / "params" / "commit_success.txt").unlink()
    refused(orbax, "commit_success.txt is missing")


def test_a_chunk_that_was_never_written(orbax):
    """Without a chunk an array reads as zeros there: that must not pass."""
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{orbax}/params/state/"}).result()
    store.delete_range(ts.KvStore.KeyRange("layers.moe.w2/c/", "layers.moe.w2/d")).result()
    (orbax / "params" / "files.json").unlink()
    refused(orbax, "is incomplete: layers.moe.w2 has 0 of 1 chunks")


def test_no_config_and_another_shape(orbax):
    config = json.loads((orbax / "config.json").read_text())
    (orbax / "config.json").write_text(json.dumps({**config, "intermediate_size": 22}))
    refused(
        orbax, r"layers.moe.w13 in .* has shape \[2, 4, 24, 2, 20\], its configuration asks for \[2, 4, 24, 2, 22\]"
    )
    (orbax / "config.json").unlink()
    refused(orbax, "has no config.json")


def pieces_of(monkeypatch, size):
    for place in (pieces, orbax_files, stream):
        monkeypatch.setattr(place, "PIECE", size)


@pytest.mark.parametrize(
    ("size", "w13", "w2", "query"),
    [
        (400, (1, 1, 24, 1, 10), (1, 1, 20, 12), (1, 24, 1, 10)),  # parts of one matrix
        (960, (1, 1, 24, 1, 20), (1, 1, 20, 24), (1, 24, 2, 10)),
        (1920, (1, 1, 24, 2, 20), (1, 2, 20, 24), (1, 24, 4, 10)),  # both halves, two experts
        (4000, (1, 4, 24, 2, 20), (2, 4, 20, 24), (2, 24, 4, 10)),
        (16 << 20, (2, 4, 24, 2, 20), (2, 4, 20, 24), (2, 24, 4, 10)),
    ],
)  # fmt: skip
def test_chunks_are_runs_of_matrices_or_a_part_of_one(orbax, monkeypatch, size, w13, w2, query):
    pieces_of(monkeypatch, size)
    hf2orbax(orbax.parent / "hf", orbax, force=True, progress=False)
    reader = OrbaxSource(orbax)._reader
    assert [reader.spec(f"layers.{name}").chunk for name in ("moe.w13", "moe.w2", "attention.query")] == [
        w13,
        w2,
        query,
    ]


def bytes_read():
    """That tensorstore took out of files."""
    import tensorstore as ts

    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def stored(directory):
    return sum(f.stat().st_size for f in directory.rglob("state/**/*") if f.is_file())


def by_dimensions(key, value):
    """How checkpoints were cut before 2026-11-29."""
    options = checkpoint.ocp.options.ArrayOptions.Saving.StorageOptions
    if getattr(value, "ndim", 0) < 4:
        return options()
    return options(chunk_byte_size=math.prod(value.shape[2:]) * value.dtype.itemsize, shard_axes=(0, 1))


@pytest.mark.parametrize("size", [None, 20_000, 60_000, 140_000, 1 << 20])
def test_pieces_of_any_size_come_out_whole_and_each_is_read_once(tmp_path, monkeypatch, size):
    """A matrix of an expert has 64 KB in fp32; None: the pieces of old checkpoints."""
    pieces_of(monkeypatch, size or 20_000)
    monkeypatch.setattr(stream, "WORKERS", 1)  # a thread that is late finds its piece gone, and reads it again
    if size is None:
        monkeypatch.setattr(checkpoint, "_chunks", by_dimensions)
    shape = {**TINY, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "head_dim": 16}
    tensors = random_tensors(shape)
    write_hub(tmp_path / "hf", shape, tensors)
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    params = jax.tree.map(jnp.asarray, load_params(tmp_path / "hf"))
    step = save_run(tmp_path / "run", params, MixtralConfig.from_hf(shape), moments={})
    for source in (tmp_path / "orbax", step):
        before = bytes_read()
        orbax2hf(source, tmp_path / "back", dtype="float32", force=True, progress=False)
        assert_same_bytes(read_hub(tmp_path / "back"), tensors)
        if size is not None:
            assert bytes_read() - before <= 1.1 * stored(source)


def save_run(directory, params, config, step=7, tokenizer=None, moments=None):
    """A run's checkpoint as the training loop saves it: a named tuple of step, params and optimizer moments."""
    from mixtral_jax.train.state import TrainState

    state = TrainState(jnp.asarray(step), params, {"mu": params} if moments is None else moments)
    run = {"model": config.model_dump(), "data": {"tokenizer": tokenizer}}
    path = directory / "checkpoints" / str(step)
    checkpoint.save(path, state, {"dataset": {"next_row": 3}, "meta": {"step": step, "config": run}})
    return path


def test_a_training_checkpoint_exports_its_parameters(tmp_path, capsys):
    tensors = random_tensors(TINY, np.float32)
    write_hub(tmp_path / "hf", TINY, tensors)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    params = jax.tree.map(jnp.asarray, load_params(tmp_path / "hf"))
    config = MixtralConfig.from_hf(TINY)
    step = save_run(tmp_path / "run", params, config, tokenizer=str(tmp_path / "tok" / "tokenizer.json"))
    orbax2hf(step, tmp_path / "exact", dtype="float32", progress=False)
    assert_same_bytes(read_hub(tmp_path / "exact"), tensors)
    assert (tmp_path / "exact" / "tokenizer.json").exists()
    # By default in the dtype of its config.json, and the bytes are said first.
    orbax2hf(step, tmp_path / "bf16", max_shard_size="1MB")
    assert_same_bytes(read_hub(tmp_path / "bf16"), {n: t.astype(BF16) for n, t in tensors.items()})
    assert f"{2 * config.num_params():,} bytes of weights in bfloat16" in capsys.readouterr().err
    # The run's directory stands for its newest whole step.
    save_run(tmp_path / "run", jax.tree.map(jnp.zeros_like, params), config, step=3)
    orbax2hf(tmp_path / "run", tmp_path / "newest", dtype="float32", progress=False)
    assert_same_bytes(read_hub(tmp_path / "newest"), tensors)


def test_training_checkpoints_that_cannot_be_exported(tmp_path):
    config = MixtralConfig.from_hf(TINY)
    lora = save_run(tmp_path / "lora", {"lora": jnp.ones((2, 3))}, config)
    with pytest.raises(ValueError, match=r"holds no whole model \(adapters only\?\): merge them first"):
        orbax2hf(lora, tmp_path / "x", progress=False)
    shutil.rmtree(lora / "meta")
    (lora / "meta").mkdir()
    with pytest.raises(ValueError, match=r"is no complete Orbax checkpoint|cannot be read"):
        orbax2hf(lora, tmp_path / "x", progress=False)
    assert os.listdir(tmp_path) == ["lora"]


def test_a_runs_tokenizer_is_exported_under_the_usual_names(tmp_path, capsys):
    """Whatever its name, and whatever else lies beside it; with all that transformers needs to read it as we do."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.model").write_bytes(b"another one")
    shutil.copy(MODEL, tmp_path / "tok" / "my.model")
    write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    params = jax.tree.map(jnp.asarray, load_params(tmp_path / "hf"))
    for name in ("my.model", "gone.model"):
        save_run(tmp_path / name, params, MixtralConfig.from_hf(TINY), tokenizer=str(tmp_path / "tok" / name))
        orbax2hf(tmp_path / name, tmp_path / f"{name}.hf", progress=False)
    out = tmp_path / "my.model.hf"
    assert (out / "tokenizer.model").read_bytes() == MODEL.read_bytes()
    texts = ("Hello  there", " naïve\n</s>")
    ids = {text: [1, *TOKENIZER.encode(text)] for text in texts}
    files = {name: (out / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    assert mj.tokenizer_facts(files, texts).items() > ids.items()  # of the tokenizer.json alone
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert not (tmp_path / "gone.model.hf" / "tokenizer.model").exists()
    assert "gone.model of the run" in capsys.readouterr().err
    small = load(tmp_path / "hf")
    with pytest.raises(ValueError, match="the tokenizer has 4096 pieces, the model knows"):
        mj.save_hf(small, tmp_path / "no", tokenizer=MODEL)
    assert not (tmp_path / "no").exists()
