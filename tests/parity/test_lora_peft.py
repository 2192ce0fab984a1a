"""Adapters against PEFT: the same weights give the same logits and gradients, out of files that each side wrote."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import hf2orbax, load, lora2peft, merge_lora, peft2lora
from mixtral_jax.convert.adapter import NativeAdapter
from mixtral_jax.lora import LoraConfig, is_adapter
from mixtral_jax.model import next_token_sums
from tests.convert_files import read_hub
from tests.lora_models import adapted, flat_params, merged, rebuilt, stored_leaves, write_native
from tests.optional import often
from tests.parity.hf_models import build

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 10)).astype(np.int32)
SPARSE = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=12)
DENSE = dict(num_local_experts=1, num_experts_per_tok=1)
CASES = {
    "attention": (SPARSE, LoraConfig(rank=3, alpha=5.0, targets=("attention.*",))),
    "experts": (SPARSE, LoraConfig(rank=3, alpha=5.0, targets=("moe.*",))),
    "all, rsLoRA": (SPARSE, LoraConfig(rank=4, alpha=3.0, rslora=True)),
    "w3 alone": (SPARSE, LoraConfig(rank=2, alpha=3.0, targets=("moe.w3", "attention.value"))),
    "w2 alone": (SPARSE, LoraConfig(rank=2, alpha=3.0, targets=("moe.w2",))),
    "dense": (DENSE, LoraConfig(rank=3, alpha=5.0, rslora=True)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:config.json sets sliding_window"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT looks for its own pattern for w1 and w3 among the modules, not the parameters; it is used all the same
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


@pytest.fixture(scope="module", params=often(CASES, lambda name: name in ("experts", "all, rsLoRA", "dense")))
def case(request, tmp_path_factory) -> dict[str, Any]:
    """A transformers model on disk, our adapters for it, and their export."""
    shape, lora = CASES[request.param]
    root = tmp_path_factory.mktemp("lora")
    pair = build(root / "base", **shape)
    leaves = {name: np.asarray(v) for name, v in flat_named(pair.params).items()}
    leaves |= {name: v for name, v in adapted(pair.config, lora)[1].items() if is_adapter(name)}
    write_native(root / "native", pair.config, lora, leaves, str(root / "base"))
    lora2peft(root / "native", root / "peft", progress=False)
    return {"root": root, "config": pair.config, "lora": lora, "leaves": leaves}


def flat_named(tree: dict, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat_named(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def in_peft(root: Path, adapter: str, *, trainable: bool = False) -> peft.PeftModel:
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, root / adapter, is_trainable=trainable)


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@functools.cache
def forward(config: MixtralConfig, lora: LoraConfig | None):
    """Logits of leaves by name, compiled once."""
    return jax.jit(lambda leaves: rebuilt(config, leaves, lora)(TOKENS))


def peft_gradients(model, config, rank: int) -> dict[str, np.ndarray]:
    """The gradients of a loaded export by our leaf names; fused experts are taken apart by hand."""
    E, F, L = config.num_local_experts, config.intermediate_size, config.num_hidden_layers
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    found: dict[str, list] = {}

    def put(target: str, a_rI: np.ndarray, b_Or: np.ndarray) -> None:
        found.setdefault(f"layers.{target}_lora.a", []).append(a_rI.T)
        found.setdefault(f"layers.{target}_lora.b", []).append(b_Or.T)

    def pair(stem: str) -> tuple[np.ndarray, np.ndarray] | None:
        names = [f"base_model.model.model.{stem}.lora_{m}.default.weight" for m in "AB"]
        return (grads[names[0]], grads[names[1]]) if names[0] in grads else None

    for layer in range(L):
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            if both := pair(f"layers.{layer}.self_attn.{theirs}_proj"):
                put(f"attention.{ours}", *both)
        for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            if both := pair(f"layers.{layer}.mlp.{theirs}_proj"):
                put(f"moe.{ours}", *both)
        for stem in ("experts.base_layer", "experts"):
            if not (both := pair(f"layers.{layer}.mlp.{stem}")):
                continue
            a, b = both[0].reshape(E, -1, both[0].shape[1]), both[1].reshape(both[1].shape[0], -1, E)
            for e in range(E):
                if b.shape[0] == 2 * F:
                    put("moe.w1", a[e, :rank], b[:F, :rank, e])
                    put("moe.w3", a[e, rank:], b[F:, rank:, e])
                else:
                    put("moe.w2", a[e], b[:, :, e])
    return {name: np.stack(parts) for name, parts in found.items()}


def test_an_export_gives_our_logits_and_gradients_in_peft(case):
    config, lora, leaves = case["config"], case["lora"], case["leaves"]
    model = in_peft(case["root"], "peft", trainable=True)
    np.testing.assert_allclose(logits(model), forward(config, lora)(leaves), atol=2e-5)
    with model.disable_adapter():
        assert np.abs(logits(model) - forward(config, lora)(leaves)).max() > 0.05

    targets = np.roll(TOKENS, -1, axis=1)
    out = model(torch.tensor(TOKENS, dtype=torch.long)).logits
    torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten()).backward()

    def loss(p):
        rows = (TOKENS, targets, np.ones(TOKENS.shape, np.float32))
        where = np.broadcast_to(np.arange(10, dtype=np.int32)[None], TOKENS.shape)
        sums, _ = next_token_sums(rebuilt(config, p, lora), *map(jnp.asarray, (*rows, where, np.ones_like(TOKENS))))
        return sums.loss_sum / TOKENS.size

    got = jax.jit(jax.grad(loss))({k: jnp.asarray(v) for k, v in leaves.items()})
    want = peft_gradients(model, config, lora.rank)
    assert {k for k in leaves if is_adapter(k)} <= want.keys()
    for name in filter(is_adapter, leaves):
        ours = np.asarray(got[name]).reshape(-1)
        theirs = want[name].reshape(-1)
        assert np.linalg.norm(theirs) > 1e-4, name
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), name


def test_what_peft_saves_again_comes_back(case):
    """transformers 5 holds the experts fused, so PEFT writes them fused: rank 2 r, block-diagonal."""
    root = case["root"]
    in_peft(root, "peft").save_pretrained(root / "again")
    peft2lora(root / "again", root / "back", base=root / "base", progress=False)
    back = NativeAdapter(root / "back")
    got = stored_leaves(back)
    assert got.keys() == {k for k in case["leaves"] if is_adapter(k)}
    for name, value in got.items():
        np.testing.assert_array_equal(value, case["leaves"][name], err_msg=name)
    assert back.lora.scale == pytest.approx(case["lora"].scale, rel=1e-12)


def test_merged_weights_give_the_same_logits(case):
    root = case["root"]
    merge_lora(root / "base", root / "merged", adapter=root / "peft", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "merged", dtype=torch.float32)
    want = forward(case["config"], case["lora"])(case["leaves"])
    np.testing.assert_allclose(logits(theirs), want, atol=3e-5)
    hf2orbax(root / "base", root / "orbax", progress=False)
    merge_lora(root / "orbax", root / "merged_orbax", adapter=root / "native", progress=False)
    for name, value in flat_params(load(root / "merged_orbax")).items():
        np.testing.assert_array_equal(value, flat_params(load(root / "merged"))[name], err_msg=name)


IMPORTS: dict[str, dict[str, Any]] = {
    "all-linear": dict(target_modules="all-linear"),
    "patterns": dict(
        target_modules=["q_proj", "v_proj", "gate"], rank_pattern={"v_proj": 8, "layers.0.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 12, "gate": 9, "gate.weight": 5},  # PEFT adapts a parameter, and never asks for "gate"
    ),
    "one pattern for all": dict(target_modules=["q_proj"], rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 16}),
    "rsLoRA with patterns": dict(target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 7}, use_rslora=True),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "gate"]),
    "head": dict(target_modules="all-linear", modules_to_save=["lm_head"]),
    "resized": dict(target_modules=["q_proj"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imports")
    build(root / "base", **SPARSE)
    return root


@pytest.mark.parametrize("name", IMPORTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_trains_is_merged_and_comes_in(plain, tmp_path, name):
    """The router's gate, ranks and scales of single modules, embedding and head saved whole and longer."""
    base = transformers.AutoModelForCausalLM.from_pretrained(plain / "base", dtype=torch.float32)
    if name == "resized":
        base.resize_token_embeddings(101, mean_resizing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **IMPORTS[name]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, p in model.named_parameters():
            if "lora_B" in own or (p.requires_grad and "lora" not in own):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(tmp_path / "peft")
    want = logits(model)
    merge_lora(plain / "base", tmp_path / "merged", adapter=tmp_path / "peft", progress=False)
    got = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    np.testing.assert_allclose(got, want, atol=3e-5)
    assert np.abs(want).max() > 0.1
    peft2lora(tmp_path / "peft", tmp_path / "native", base=plain / "base", progress=False)
    merge_lora(plain / "base", tmp_path / "again", adapter=tmp_path / "native", progress=False)
    again = read_hub(tmp_path / "again")
    for key, tensor in read_hub(tmp_path / "merged").items():
        np.testing.assert_allclose(again[key], tensor, atol=1e-6, err_msg=key)
    if "gate" not in IMPORTS[name].get("modules_to_save", []):
        hf2orbax(plain / "base", tmp_path / "orbax", progress=False)  # which transformers cannot open
        lora2peft(tmp_path / "native", tmp_path / "out", base=tmp_path / "orbax", progress=False)
        back = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        np.testing.assert_allclose(logits(back), want, atol=3e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tied_embedding_that_is_trained_whole_stays_tied(tmp_path):
    build(tmp_path / "base", **SPARSE, tie_word_embeddings=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.requires_grad * 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "peft")
    peft2lora(tmp_path / "peft", tmp_path / "native", base=tmp_path / "base", progress=False)
    lora2peft(tmp_path / "native", tmp_path / "out", progress=False)
    np.testing.assert_allclose(logits(in_peft(tmp_path, "out")), logits(model), atol=3e-5)
    merge_lora(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "peft", progress=False)
    got = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    np.testing.assert_allclose(got, logits(model), atol=3e-5)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rsLoRA"])
@pytest.mark.parametrize(
    "parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids=["both", "gate_up", "down"]
)
def test_a_fused_adapter_of_transformers_5_comes_in(tmp_path, parameters, rslora):
    """Trained by target_parameters: one A for w1 and w3."""
    pair = build(tmp_path / "base", **SPARSE)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=rslora, target_modules=["q_proj", "o_proj"],
        target_parameters=[f"mlp.experts.{p}" for p in parameters], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(tmp_path / "peft")
    note = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert note["target_parameters"]
    peft2lora(tmp_path / "peft", tmp_path / "native", base=tmp_path / "base", progress=False)
    adapter = NativeAdapter(tmp_path / "native")
    leaves = flat_named(pair.params) | stored_leaves(adapter)
    experts = {"gate_up_proj": ("moe.w1", "moe.w3"), "down_proj": ("moe.w2",)}
    wanted = {"attention.query", "attention.output"}.union(*(experts[p] for p in parameters))
    assert set(adapter.lora.targets) == wanted
    if "gate_up_proj" in parameters:
        np.testing.assert_array_equal(leaves["layers.moe.w1_lora.a"], leaves["layers.moe.w3_lora.a"])
    got = forward(pair.config, None)(merged(leaves, adapter.lora.scale))
    np.testing.assert_allclose(got, logits(model), atol=2e-5)
