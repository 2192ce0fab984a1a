"""Orbax checkpoints that are not ours or not whole, and the checkpoints of training runs."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import hf2orbax, load_params, orbax2hf
from mixtral_jax.convert.orbax import OrbaxSource
from tests.convert_files import BF16, TINY, assert_same_bytes, random_tensors, read_hub, write_hub


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
    store.delete_range(ts.KvStore.KeyRange("layers.moe.w2/c/1/3", "layers.moe.w2/c/1/4")).result()
    (orbax / "params" / "files.json").unlink()
    refused(orbax, "is incomplete: layers.moe.w2 has 7 of 8 chunks")


def test_no_config_and_another_shape(orbax):
    config = json.loads((orbax / "config.json").read_text())
    (orbax / "config.json").write_text(json.dumps({**config, "intermediate_size": 22}))
    refused(
        orbax, r"layers.moe.w13 in .* has shape \[2, 4, 24, 2, 20\], its configuration asks for \[2, 4, 24, 2, 22\]"
    )
    (orbax / "config.json").unlink()
    refused(orbax, "has no config.json")


def test_chunks_are_one_layer_one_expert_one_half(orbax):
    reader = OrbaxSource(orbax)._reader
    assert reader.spec("layers.moe.w13").chunk == (1, 1, 24, 1, 20)
    assert reader.spec("layers.moe.w2").chunk == (1, 1, 20, 24)
    assert reader.spec("layers.attention.query").chunk == (1, 24, 4, 10)


def save_run(directory, params, config, step=7, tokenizer=None):
    """A run's checkpoint as the training loop saves it: a named tuple of step, params and optimizer moments."""
    from mixtral_jax.train.state import TrainState

    state = TrainState(jnp.asarray(step), params, {"mu": params, "nu": jax.tree.map(jnp.square, params)})
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
