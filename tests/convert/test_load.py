"""Checkpoints as models and back, on one device and on a mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import hf2orbax, load, load_config, save_hf
from mixtral_jax.convert.parts import read_parts
from mixtral_jax.convert.pipeline import open_source
from mixtral_jax.convert.table import leaves
from mixtral_jax.lora import LoraConfig
from mixtral_jax.model import abstract_model
from mixtral_jax.parallel.mesh import MeshConfig, make_mesh
from tests.convert_files import (
    BF16,
    TINY,
    assert_same_bytes,
    load_params,
    random_tensors,
    read_hub,
    read_leaf,
    write_hub,
)
from tests.tiny import tiny_config, tiny_model, write_byte_tokenizer

# The model is split over the mesh: sizes that the axes divide.
EVEN = {**TINY, "vocab_size": 40, "head_dim": 8}


@pytest.fixture
def checkpoints(tmp_path):
    write_hub(tmp_path / "hf", EVEN, random_tensors(EVEN, BF16), shards=2)
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    return tmp_path


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_load_keeps_or_casts_the_dtype(checkpoints, kind):
    want = load_params(checkpoints / "hf")
    model = load(checkpoints / kind)
    assert load_config(checkpoints / kind) == model.config
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes(), params_of(model), want
    )
    assert jax.tree.all(same)
    cast = params_of(load(checkpoints / kind, dtype=jnp.float32))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b.astype(np.float32)), cast, want))
    assert jax.eval_shape(model, jnp.array([[1, 2, 3]])).shape == (1, 3, 40)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_load_onto_a_mesh(checkpoints, kind):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    model = load(checkpoints / kind, mesh=mesh)
    want = load_params(checkpoints / "hf")
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), params_of(model), want))
    w13 = params_of(model)["layers"]["moe"]["w13"]
    assert w13.addressable_shards[0].data.shape == (2, 2, 12, 2, 10)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_part_of_a_leaf_is_that_part(checkpoints, kind):
    source = open_source(checkpoints / kind)
    rng = np.random.default_rng(0)
    for leaf in leaves(source.config):
        whole = read_leaf(source, leaf)
        for _ in range(3):
            box = tuple(tuple(sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in leaf.shape)
            want = whole[tuple(slice(a, b) for a, b in box)]
            got = np.zeros_like(want)

            def take(_, at, values, got=got):
                got[tuple(slice(a, a + n) for a, n in zip(at, values.shape, strict=True))] = values

            read_parts(source, leaf, [box], take)
            assert got.tobytes() == want.tobytes(), leaf.path


def test_save_hf_writes_what_was_loaded(checkpoints):
    model = load(checkpoints / "orbax")
    save_hf(model, checkpoints / "saved")
    assert_same_bytes(read_hub(checkpoints / "saved"), random_tensors(EVEN, BF16))
    assert load_config(checkpoints / "saved") == model.config
    save_hf(load(checkpoints / "saved", dtype=jnp.float32), checkpoints / "again", dtype="bfloat16")
    assert_same_bytes(read_hub(checkpoints / "again"), random_tensors(EVEN, BF16))
    with pytest.raises(FileExistsError, match="exists already"):
        save_hf(model, checkpoints / "saved")


def test_the_tokens_of_an_export_are_those_of_its_tokenizer(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    save_hf(tiny_model(tiny_config()), tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    for name in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "out" / name).read_text())
        assert (told["bos_token_id"], told["eos_token_id"]) == (0, 1)


def test_save_hf_names_what_the_format_has_no_place_for(tmp_path):
    """The adapters of a LoRA run's model would be lost without a word; so would a bias of the router."""
    config = MixtralConfig.from_hf(TINY)
    for lora in (LoraConfig(rank=2), LoraConfig(rank=2, base_dtype="int8", base_block=2, targets=())):
        with pytest.raises(ValueError, match=r"no place .*: layers\.(attention\.key_lora\.a|\S+\.codes)"):
            save_hf(abstract_model(config, lora=lora), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = abstract_model(config)
    model.layers.moe.router_bias = nnx.Param(jnp.zeros(4))
    with pytest.raises(ValueError, match=r"no place .*: layers\.moe\.router_bias"):
        save_hf(model, tmp_path / "out")


def test_save_hf_from_a_mesh(checkpoints):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    save_hf(load(checkpoints / "orbax", mesh=mesh), checkpoints / "saved")
    assert_same_bytes(read_hub(checkpoints / "saved"), random_tensors(EVEN, BF16))
