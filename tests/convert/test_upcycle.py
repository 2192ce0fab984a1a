"""A dense model as a mixture: the same outputs at step 0."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import ComputeConfig
from mixtral_jax.convert import hf2orbax, load, upcycle
from tests.convert_files import BF16, DENSE, TINY, load_params, random_tensors, write_hub

LLAMA = {**DENSE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 5, "mlp_bias": False}
TOKENS = jnp.array([[1, 5, 9, 2, 30, 7, 7, 0]])
FP32 = ComputeConfig(dtype="float32")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts, top_k", [(4, 2), (3, 1), (2, 2)])
def test_outputs_are_those_of_the_dense_model(tmp_path, experts, top_k, tied):
    shape = {**DENSE, "tie_word_embeddings": tied}
    write_hub(tmp_path / "dense", shape, random_tensors(shape))
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=experts, top_k=top_k, progress=False)
    dense, moe = (load(tmp_path / name, compute=FP32) for name in ("dense", "moe"))
    assert (moe.config.num_local_experts, moe.config.num_experts_per_tok) == (experts, top_k)
    run = jax.jit(lambda model: model(TOKENS))
    logits = run(dense)
    assert float(jnp.abs(logits).max()) > 0.3
    np.testing.assert_allclose(run(moe), logits, atol=1e-4)


def test_a_llama_keeps_its_token_ids_and_small_random_routers(tmp_path):
    write_hub(tmp_path / "llama", LLAMA, random_tensors(LLAMA, BF16))
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    upcycle(tmp_path / "llama", tmp_path / "moe", experts=8, top_k=2, progress=False)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["bos_token_id"] == 5 and "mlp_bias" not in config
    assert (tmp_path / "moe" / "tokenizer.json").exists()
    router = load_params(tmp_path / "moe")["layers"]["moe"]["router"].astype(np.float32)
    assert router.shape == (2, 24, 8) and 0.015 < router.std() < 0.025
    assert not np.array_equal(router[0], router[1])


def test_noise_has_the_size_that_was_asked_and_experts_then_differ(tmp_path):
    tensors = random_tensors(DENSE)
    write_hub(tmp_path / "dense", DENSE, tensors)
    for name in ("a", "b"):
        upcycle(tmp_path / "dense", tmp_path / name, experts=3, top_k=2, noise=0.1, progress=False)
    a, b = load_params(tmp_path / "a")["layers"]["moe"], load_params(tmp_path / "b")["layers"]["moe"]
    assert np.array_equal(a["w13"], b["w13"]) and np.array_equal(a["w2"], b["w2"])  # seeded
    for e in range(3):
        dense = tensors["model.layers.1.mlp.up_proj.weight"]
        noise = a["w13"][1, e, :, 1].T - dense
        relative = noise / np.sqrt((dense**2).mean(1, keepdims=True))
        assert abs(relative.std() - 0.1) < 0.015
    assert not np.allclose(a["w13"][0, 0], a["w13"][0, 1]) and not np.allclose(a["w2"][0, 0], a["w2"][0, 2])


def test_what_cannot_be_upcycled(tmp_path):
    write_hub(tmp_path / "moe", TINY, random_tensors(TINY))
    write_hub(tmp_path / "llama", LLAMA, random_tensors(LLAMA))
    with pytest.raises(ValueError, match="MixtralForCausalLM: supported are mistral, llama"):
        upcycle(tmp_path / "moe", tmp_path / "x", experts=4, top_k=2, progress=False)
    for experts, top_k in ((1, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match="at least 2 experts and 1 <= top_k <= experts"):
            upcycle(tmp_path / "llama", tmp_path / "x", experts=experts, top_k=top_k, progress=False)
    with pytest.raises(ValueError, match="must not be negative"):
        upcycle(tmp_path / "llama", tmp_path / "x", experts=4, top_k=2, noise=-1.0, progress=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        hf2orbax(tmp_path / "llama", tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
