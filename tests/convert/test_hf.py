"""Bad Hugging Face directories: one sentence each, and nothing is written."""

import json
import os

import numpy as np
import pytest

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import hf2orbax, open_source
from mixtral_jax.convert.files import Directory
from mixtral_jax.convert.hf import HfSource, parse_size, read_shape
from tests.convert_files import TINY, fuse, random_tensors, write_hub

NAME = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def refused(tmp_path, match):
    with pytest.raises(ValueError, match=match) as error:
        hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["hf"]


def test_no_config(tmp_path):
    write_hub(tmp_path / "hf", TINY, random_tensors(TINY), config=False)
    refused(tmp_path, "has no config.json: it is no model directory")


def test_config_that_does_not_parse(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    (source / "config.json").write_text("{")
    refused(tmp_path, "config.json is no JSON")
    (source / "config.json").write_text("[]")
    refused(tmp_path, "config.json holds no JSON object")


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        hf2orbax(tmp_path / "nowhere", tmp_path / "orbax", progress=False)


def test_another_architecture(tmp_path):
    config = {**TINY, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
    write_hub(tmp_path / "hf", config, random_tensors(TINY))
    refused(tmp_path, "config.json names architecture Qwen2MoeForCausalLM")


@pytest.mark.parametrize(
    "extra, match",
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type 'yarn' is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\)"),
    ],
)
def test_variants_are_refused_by_name(tmp_path, extra, match):
    write_hub(tmp_path / "hf", {**TINY, **extra}, random_tensors(TINY))
    refused(tmp_path, match)


def test_a_shape_that_makes_no_sense(tmp_path):
    write_hub(tmp_path / "hf", {**TINY, "num_key_value_heads": 3, "vocab_size": "many"}, random_tensors(TINY))
    refused(tmp_path, "does not describe a model: vocab_size: Input should be a valid integer")


def test_a_shard_missing_on_disk(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY), shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names")


def test_one_file_beside_an_index_of_others_is_refused(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY), shards=3)
    (source / "model.safetensors").write_bytes((source / "model-00001-of-00003.safetensors").read_bytes())
    refused(tmp_path, r"holds model\.safetensors and model\.safetensors\.index\.json, which names other files")


def test_a_shard_missing_from_the_index(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY), shards=3)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {n: f for n, f in content["weight_map"].items() if "00002" not in f}
    index.write_text(json.dumps(content))
    refused(tmp_path, "index.json does not name model-00002-of-00003.safetensors, which is there")
    index.unlink()
    refused(tmp_path, "has 3 shards .* but no model.safetensors.index.json")
    index.write_text("{}")
    refused(tmp_path, "does not parse")


def test_an_index_that_names_a_tensor_its_shard_does_not_hold(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY), shards=2)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(tmp_path, "places model.ghost in model-00001-of-00002.safetensors, which does not hold it")


@pytest.mark.parametrize("keep", [3, 100, -1])
def test_a_truncated_file(tmp_path, keep):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors is truncated")


def test_wrong_shape(tmp_path):
    tensors = random_tensors(TINY)
    write_hub(tmp_path / "hf", TINY, {**tensors, NAME: tensors[NAME].T.copy()})
    refused(tmp_path, f"{NAME} in .* has shape \\[24, 20\\], config.json asks for \\[20, 24\\]")


def test_wrong_dtype(tmp_path):
    tensors = random_tensors(TINY)
    write_hub(tmp_path / "hf", TINY, {**tensors, NAME: tensors[NAME].astype(np.int8)})
    refused(tmp_path, f"{NAME} in model.safetensors is I8: only BF16, F16 and F32 are converted")


def test_missing_and_extra_tensors_are_both_listed(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.9.extra"] = tensors.pop(NAME)
    write_hub(tmp_path / "hf", TINY, tensors)
    refused(tmp_path, rf"missing tensors 1 \({NAME}\); unexpected 1 \(model.layers.9.extra\)")


def test_two_layouts_mixed(tmp_path):
    tensors = random_tensors(TINY)
    write_hub(tmp_path / "hf", TINY, {**tensors, **fuse(tensors, TINY)})
    refused(tmp_path, "two expert layouts are mixed: .*mlp.experts.*_proj .fused. and .*block_sparse_moe")


def test_pickled_weights(tmp_path):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(tmp_path, r"holds pickled weights \(pytorch_model.bin\), which are not read: save it as safetensors")
    (source / "pytorch_model.bin").unlink()
    refused(tmp_path, "holds no weights")


def test_sliding_window_of_a_mixtral_warns(tmp_path):
    write_hub(tmp_path / "hf", {**TINY, "sliding_window": 4096}, random_tensors(TINY))
    with pytest.warns(
        UserWarning, match="sets sliding_window 4096 for a Mixtral; the released Mixtral models have none"
    ):
        HfSource(tmp_path / "hf")


def test_tied_head_that_is_there_a_second_time(tmp_path):
    config = {**TINY, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    write_hub(tmp_path / "same", config, same)
    assert HfSource(tmp_path / "same").config.tie_word_embeddings
    write_hub(tmp_path / "hf", config, {**tensors, "lm_head.weight": -tensors["model.embed_tokens.weight"]})
    (tmp_path / "same").rename(tmp_path / "hf" / "same")
    refused(tmp_path, "ties the embeddings, but lm_head.weight differs")


def test_old_rotary_buffers_are_passed_over(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    write_hub(tmp_path / "hf", TINY, tensors)
    assert len(HfSource(tmp_path / "hf").slots) == len(tensors) - 1


KINDS = ["text", 1, 1.5, True, None, [], [None], ["a"], {}, {"a": 1}]
EXTRA = {
    "quantization_config": None, "rope_scaling": None, "rope_parameters": None, "attention_bias": False,
    "partial_rotary_factor": 1.0, "hidden_act": "silu", "router_jitter_noise": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("key", [*TINY, *EXTRA])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_value_of_any_kind_is_read_or_one_sentence(tmp_path, key):
    """As json reads it: no string is a number, no truth value is one."""
    fields = MixtralConfig.model_fields
    passed = ("architectures", "torch_dtype", "rope_scaling", "rope_parameters", "partial_rotary_factor",
              "router_jitter_noise")  # fmt: skip
    for value in KINDS:
        try:
            config = read_shape({**TINY, **EXTRA, key: value}, Directory(tmp_path))
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
        else:
            wanted = fields[key].annotation if key in fields else object
            assert value is None or wanted is object or type(value) in (int, wanted), (value, config)
            assert key in fields or not value or key in passed, value


@pytest.mark.parametrize(
    "index", [[], "a", {"weight_map": []}, {"weight_map": {"a": None}}, {"weight_map": {"a": [1]}}]
)
def test_an_index_of_a_wrong_kind(tmp_path, index):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "does not parse: an object whose weight_map gives tensors their files was expected")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("800", 800), (800, 800)])
def test_a_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1,5GB", "1,000MB", "5GB junk", "5GB!", "5Gbit", "big", "", "0", "-1", True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"max_shard_size .* is no size: write it as 5GB, 500MB"):
        parse_size(text)


# --- hostile or broken directories: each was seen to hang or to end in a traceback ---

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n"


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"num_local_experts": 10**7}])
@pytest.mark.parametrize("layout", ["hub", "fused", "mistral", "orbax"])
def test_a_config_that_asks_for_more_than_the_files_can_hold(tmp_path, change, layout):
    tensors = random_tensors(TINY)
    source = write_hub(tmp_path / "hf", TINY, fuse(tensors, TINY) if layout == "fused" else tensors)
    if layout == "orbax":
        hf2orbax(source, tmp_path / "model", progress=False)
        source = tmp_path / "model"
    name, content = "config.json", {**TINY, **change}
    if layout == "mistral":
        os.rename(source / "model.safetensors", source / "consolidated.safetensors")
        os.unlink(source / "config.json")
        name, content = "params.json", dict(
            vocab_size=37, dim=24, hidden_dim=20, n_heads=4, n_kv_heads=2, norm_eps=1e-5, head_dim=10,
            n_layers=change.get("num_hidden_layers", 2),
            moe=dict(num_experts=change.get("num_local_experts", 4), num_experts_per_tok=2),
        )  # fmt: skip
    (source / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"10+ layers|10+ experts|has shape \[2, .*asks for") as error:
        open_source(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pointer_or_a_pipe_in_place_of_a_file(tmp_path, name):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    (source / name).write_bytes(POINTER)
    refused(tmp_path, f"{name} is a pointer of Git LFS, not the file itself: run git lfs pull in its directory")
    os.unlink(source / name)
    os.mkfifo(source / name)
    refused(tmp_path, rf"{name} is no regular file \(a pipe, a device\?\)")


def test_a_pointer_among_the_small_files(tmp_path):
    (write_hub(tmp_path / "hf", TINY, random_tensors(TINY)) / "tokenizer.model").write_bytes(POINTER)
    refused(tmp_path, "tokenizer.model is a pointer of Git LFS")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_nested_too_deeply(tmp_path, name):
    (write_hub(tmp_path / "hf", TINY, random_tensors(TINY)) / name).write_text('{"a":' * 100_000)
    refused(tmp_path, f"{name} (is no JSON|does not parse)")


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_a_weight_map_that_leads_out_of_the_directory(tmp_path, place):
    source = write_hub(tmp_path / "hf", TINY, random_tensors(TINY), shards=2)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NAME] = place
    index.write_text(json.dumps(content))
    refused(tmp_path, f"lacks {place}, which model.safetensors.index.json names")


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "router_aux_loss_coef"])
def test_settings_that_are_no_number(tmp_path, key):
    write_hub(tmp_path / "hf", {**TINY, key: float("nan")}, random_tensors(TINY))
    refused(tmp_path, f"does not describe a model: {key}: Input should be")
