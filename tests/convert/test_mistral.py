"""Mistral's own files: names, params.json, and rotary pairs that are adjacent."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mixtral_jax.convert import hf2orbax, open_source, orbax2hf
from mixtral_jax.convert.mistral import MistralSource
from tests.convert_files import BF16, DENSE, TINY, assert_same_bytes, random_tensors, read_hub


def interleave(matrix, heads):
    """Rows of a head from halves (i, i + H/2) to adjacent pairs: the inverse of what is tested, row by row."""
    size = len(matrix) // heads
    out = np.empty_like(matrix)
    for h in range(heads):
        for i in range(size // 2):
            out[h * size + 2 * i] = matrix[h * size + i]
            out[h * size + 2 * i + 1] = matrix[h * size + size // 2 + i]
    return out


def to_mistral(tensors, c, merged=False):
    """Hub tensors under Mistral's names."""
    words = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
             "gate_proj": "w1", "up_proj": "w3",
             "post_attention_layernorm": "ffn_norm", "mlp": "feed_forward", "down_proj": "w2",
             "embed_tokens": "tok_embeddings", "lm_head": "output"}  # fmt: skip
    if not merged:
        words["block_sparse_moe"] = "feed_forward"
    out = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("model.")
        for ours, theirs in words.items():
            new = new.replace(ours, theirs)
        heads = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}
        count = next((n for key, n in heads.items() if key in name), 0)
        out[new] = interleave(tensor, count) if count else tensor
    if merged:
        for i in range(c["num_hidden_layers"]):
            block = f"layers.{i}.block_sparse_moe."
            for w in ("w1", "w2", "w3"):
                parts = [out.pop(f"{block}experts.{e}.{w}.weight") for e in range(c["num_local_experts"])]
                out[block + w] = np.concatenate([p.T if w == "w2" else p for p in parts])
    return out


def params_json(c, **extra):
    params = dict(
        dim=c["hidden_size"], n_layers=c["num_hidden_layers"], head_dim=c["head_dim"],
        hidden_dim=c["intermediate_size"], n_heads=c["num_attention_heads"], n_kv_heads=c["num_key_value_heads"],
        norm_eps=1e-5, vocab_size=c["vocab_size"],
    )  # fmt: skip
    if c["model_type"] == "mixtral":
        params["moe"] = {"num_experts": c["num_local_experts"], "num_experts_per_tok": c["num_experts_per_tok"]}
    return params | extra


def write_mistral(directory, c, tensors, **extra):
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(params_json(c, **extra)))
    names = list(tensors)
    for n in range(2):
        own = {name: np.ascontiguousarray(tensors[name]) for name in names[n::2]}
        save_file(own, directory / f"consolidated.{n:02}.safetensors")
    return directory


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_mixture_becomes_the_hub_tensors(tmp_path, merged, dtype):
    tensors = random_tensors(TINY, dtype)
    write_mistral(tmp_path / "m", TINY, to_mistral(tensors, TINY, merged), rope_theta=1e6)
    hf2orbax(tmp_path / "m", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "hub", progress=False)
    assert_same_bytes(read_hub(tmp_path / "hub"), tensors)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["rope_theta"] == 1e6 and config["num_local_experts"] == 4


def test_dense_becomes_the_hub_tensors(tmp_path):
    tensors = random_tensors(DENSE)
    write_mistral(tmp_path / "m", DENSE, to_mistral(tensors, DENSE), sliding_window=64)
    hf2orbax(tmp_path / "m", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "hub", progress=False)
    assert_same_bytes(read_hub(tmp_path / "hub"), tensors)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["rope_theta"]) == ("mistral", 64, 1e4)


def test_permuted_queries_rotate_alike():
    """Scores of interleaved rotation on Mistral's rows = scores of half-split rotation on the hub's rows."""
    rng = np.random.default_rng(0)
    size, dim = 10, 24
    hub = rng.standard_normal((2, size, dim))  # one head of q, one of k
    mistral = np.stack([interleave(m, 1) for m in hub])
    x = rng.standard_normal((2, dim))
    angles = np.array([3.0, 11.0])[:, None] * 1e4 ** (-np.arange(size // 2) / (size // 2))

    def half_split(v, a):
        left, right = v[: size // 2], v[size // 2 :]
        return np.concatenate([left * np.cos(a) - right * np.sin(a), right * np.cos(a) + left * np.sin(a)])

    def pairs(v, a):
        z = (v[0::2] + 1j * v[1::2]) * np.exp(1j * a)
        return np.stack([z.real, z.imag], -1).ravel()

    ours = [half_split(hub[i] @ x[i], angles[i]) for i in range(2)]
    theirs = [pairs(mistral[i] @ x[i], angles[i]) for i in range(2)]
    np.testing.assert_allclose(ours[0] @ ours[1], theirs[0] @ theirs[1], rtol=1e-12)


def test_beside_a_config_json_the_weights_say_which_layout_it_is(tmp_path):
    """A download of one of the two layouts holds the small files of both."""
    tensors = random_tensors(TINY)
    write_mistral(tmp_path / "m", TINY, to_mistral(tensors, TINY), rope_theta=7.0)
    (tmp_path / "m" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    source = open_source(tmp_path / "m")
    assert isinstance(source, MistralSource) and source.config.rope_theta == 7.0
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert open_source(tmp_path / "m").config.rope_theta == 1e6


@pytest.mark.parametrize("value", ["text", 1.5, True, [], [None], {}, {"a": 1}, -1])
def test_params_of_any_kind_are_one_sentence(tmp_path, value):
    write_mistral(tmp_path / "m", TINY, {"a": np.zeros(1, np.float32)})
    for key in [*params_json(TINY), "rope_theta", "sliding_window", "yarn", "quantization", "tied_embeddings"]:
        (tmp_path / "m" / "params.json").write_text(json.dumps(params_json(TINY, **{key: value})))
        with pytest.raises(ValueError) as error:  # at the latest, that it holds none of the tensors
            MistralSource(tmp_path / "m")
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "m" / "params.json").write_text(json.dumps(params_json(TINY, yarn={"factor": 4})))
    with pytest.raises(ValueError, match=r"params\.json .*: yarn is .*, which is not supported"):
        MistralSource(tmp_path / "m")


def test_bad_directories(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "params.json").write_text(json.dumps(params_json(TINY)))
    with pytest.raises(ValueError, match=r"no consolidated\*.safetensors"):
        MistralSource(tmp_path / "none")
    (tmp_path / "none" / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="does not parse or lacks a key: 'vocab_size'"):
        MistralSource(tmp_path / "none")
    tensors = to_mistral(random_tensors(TINY), TINY)
    tensors["extra"] = tensors.pop("output.weight")
    write_mistral(tmp_path / "extra", TINY, tensors)
    with pytest.raises(ValueError, match=r"missing tensors 1 \(output.weight\); unexpected 1 \(extra\)"):
        MistralSource(tmp_path / "extra")
