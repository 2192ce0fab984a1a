"""Adapter files: round trips without PEFT, what is written, and one sentence for each bad input."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.linalg import block_diag

from mixtral_jax import launch
from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert import hf2orbax, lora2peft, merge_lora, peft2lora
from mixtral_jax.convert.adapter import NativeAdapter
from mixtral_jax.lora import LoraConfig, is_adapter
from tests.convert_files import BF16, DENSE, TINY, load_params, random_tensors, read_hub, write_hub
from tests.lora_models import adapter_tree, merged, stored_leaves, write_native

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.1)
HUB = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj", "moe.w1": "block_sparse_moe.experts.{e}.w1",
    "moe.w3": "block_sparse_moe.experts.{e}.w3", "moe.w2": "block_sparse_moe.experts.{e}.w2",
}  # fmt: skip


def random_leaves(c: dict, lora: LoraConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """Adapter leaves of a hub config, shapes written out by hand."""
    L, D, F, H, r = c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], c["head_dim"], lora.rank
    N, K, E = c["num_attention_heads"], c["num_key_value_heads"], c.get("num_local_experts", 1)
    shapes = {
        "attention.query": ((L, D, r), (L, r, N, H)), "attention.key": ((L, D, r), (L, r, K, H)),
        "attention.value": ((L, D, r), (L, r, K, H)), "attention.output": ((L, N, H, r), (L, r, D)),
        "moe.w1": ((L, E, D, r), (L, E, r, F)), "moe.w3": ((L, E, D, r), (L, E, r, F)),
        "moe.w2": ((L, E, F, r), (L, E, r, D)),
    }  # fmt: skip
    rng = np.random.default_rng(3)
    return {
        f"layers.{t}_lora.{m}": rng.standard_normal(shape).astype(dtype)
        for t, pair in shapes.items()
        if lora.adapts(t)
        for m, shape in zip("ab", pair, strict=True)
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "base", TINY, random_tensors(TINY))


def native(tmp_path: Path, c=TINY, lora=LORA, dtype=np.float32) -> dict[str, np.ndarray]:
    leaves = random_leaves(c, lora, dtype)
    write_native(tmp_path / "native", MixtralConfig.from_hf(c), lora, leaves, str(tmp_path / "base"))
    return leaves


def stored(directory: Path) -> dict[str, np.ndarray]:
    """The leaves of an adapter directory of ours."""
    return stored_leaves(NativeAdapter(directory))


@pytest.mark.parametrize("shape", [TINY, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["fp32", "bf16"])
def test_a_round_trip_is_exact(tmp_path, shape, dtype):
    write_hub(tmp_path / "base", shape, random_tensors(shape))
    leaves = native(tmp_path, shape, dtype=dtype)
    lora2peft(tmp_path / "native", tmp_path / "peft", progress=False)
    peft2lora(tmp_path / "peft", tmp_path / "back", progress=False)  # the base is named in adapter_config.json
    got = stored(tmp_path / "back")
    assert got.keys() == leaves.keys()
    for name, value in leaves.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape)
        assert got[name].tobytes() == value.tobytes(), name
    lora2peft(tmp_path / "back", tmp_path / "again", progress=False)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()


def test_what_an_export_holds(tmp_path):
    leaves = native(tmp_path)
    lora2peft(tmp_path / "native", tmp_path / "peft", progress=False)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    want = {}
    for target, hub in HUB.items():
        for i in range(2):
            for e in range(4 if "moe" in target else 1):
                index = (i, e) if "moe" in target else (i,)
                stem = f"base_model.model.model.layers.{i}.{hub.format(e=e)}"
                want[f"{stem}.lora_A.weight"] = leaves[f"layers.{target}_lora.a"][index].reshape(-1, 3).T
                want[f"{stem}.lora_B.weight"] = leaves[f"layers.{target}_lora.b"][index].reshape(3, -1).T
    assert tensors.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    note = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert (note["r"], note["lora_alpha"], note["use_rslora"], note["lora_dropout"]) == (3, 5, False, 0.0)
    assert note["target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"])


def test_rslora_leaves_as_plain_lora(tmp_path):
    native(tmp_path, lora=LoraConfig(rank=4, alpha=3.0, rslora=True, dropout=0.2, targets=("attention.*",)))
    lora2peft(tmp_path / "native", tmp_path / "peft", progress=False)
    note = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert (note["lora_alpha"], note["use_rslora"], note["lora_dropout"]) == (6, False, 0.2)


@pytest.mark.parametrize("target", ["moe.w1", "moe.w3"])
def test_what_peft_needs_beside_one_matrix_is_filled_in_and_dropped_again(tmp_path, base, target):
    leaves = native(tmp_path, lora=LoraConfig(rank=2, targets=(target,)))
    lora2peft(tmp_path / "native", tmp_path / "peft", progress=False)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    filled = {n for n, t in tensors.items() if not t.any()}
    assert len(tensors) == 3 * 2 * 4 * 2 and len(filled) == 2 * 2 * 4 * 2
    peft2lora(tmp_path / "peft", tmp_path / "back", base=base, progress=False)
    got = stored(tmp_path / "back")
    assert got.keys() == leaves.keys()
    assert all(got[n].tobytes() == leaves[n].tobytes() for n in got)


def fuse_experts(tensors: dict[str, np.ndarray], shared: bool) -> dict[str, np.ndarray]:
    """The pairs of the experts as PEFT saves them from transformers 5, put together by hand; rank 3, 4 experts.

    `shared`: w1 and w3 have one A, that of w1; else ranks of their own and a block-diagonal B.
    """
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        old, new = (f"base_model.model.model.layers.{layer}.{m}.experts" for m in ("block_sparse_moe", "mlp"))
        for module, names in (("", ("w2",)), (".base_layer", ("w1", "w3"))):
            a, b = ([[tensors[f"{old}.{e}.{w}.lora_{m}.weight"] for w in names] for e in range(4)] for m in "AB")
            if shared:
                pairs = [(a_e[0], np.concatenate(b_e)) for a_e, b_e in zip(a, b, strict=True)]
            else:
                pairs = [(np.concatenate(a_e), block_diag(*b_e)) for a_e, b_e in zip(a, b, strict=True)]
            fused_b = np.stack([b_e for _, b_e in pairs], axis=-1)
            out[f"{new}{module}.lora_A.weight"] = np.concatenate([a_e for a_e, _ in pairs])
            out[f"{new}{module}.lora_B.weight"] = fused_b.reshape(len(fused_b), -1)
    return out


@pytest.mark.parametrize("shared", [False, True])
def test_fused_experts_come_apart(tmp_path, base, shared):
    peft, tensors = exported(tmp_path)
    save_file(fuse_experts(tensors, shared), peft / WEIGHTS)
    says(peft, **({} if shared else {"rank_pattern": {"gate_up_proj": 6}, "alpha_pattern": {"gate_up_proj": 10}}))
    peft2lora(peft, tmp_path / "back", progress=False)
    lora2peft(tmp_path / "back", tmp_path / "apart", progress=False)
    got = load_file(tmp_path / "apart" / WEIGHTS)
    assert got.keys() == tensors.keys()
    for name, tensor in got.items():
        same = name.replace(".w3.lora_A", ".w1.lora_A") if shared else name
        assert tensor.tobytes() == tensors[same].tobytes(), name


def test_fused_halves_that_use_all_ranks_share_them(tmp_path, base):
    """What PEFT trains itself with all-linear. Layer 0 comes apart as before, its ranks filled up with zeros."""
    peft, tensors = exported(tmp_path)
    fused = fuse_experts(tensors, shared=False)
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight"
    fused[name.format("B")][0, -1] = 1.0  # w1 of expert 3 uses the last rank, one of w3's
    save_file(fused, peft / WEIGHTS)
    says(peft, rank_pattern={"gate_up_proj": 6}, alpha_pattern={"gate_up_proj": 10})
    peft2lora(peft, tmp_path / "out", progress=False)
    got, scale = stored(tmp_path / "out"), NativeAdapter(tmp_path / "out").lora.scale
    assert got["layers.moe.w1_lora.a"].shape == (2, 4, 24, 6) and scale == pytest.approx(5 / 3)
    a = fused[name.format("A")].reshape(4, 6, 24)
    np.testing.assert_array_equal(got["layers.moe.w1_lora.a"][1].mT, a)
    np.testing.assert_array_equal(got["layers.moe.w3_lora.a"][1].mT, a)
    assert got["layers.moe.w1_lora.b"][1, 3, 5, 0] == 1.0
    w3 = "base_model.model.model.layers.0.block_sparse_moe.experts.2.w3.lora_{}.weight"
    both = got["layers.moe.w3_lora.a"][0, 2] @ got["layers.moe.w3_lora.b"][0, 2]
    np.testing.assert_allclose(both.T, tensors[w3.format("B")] @ tensors[w3.format("A")], rtol=1e-5, atol=1e-6)
    assert not got["layers.moe.w3_lora.a"][0, 2, :, 3:].any() and not got["layers.attention.query_lora.b"][:, 3:].any()


def test_a_step_of_a_lora_run_is_an_adapter(tmp_path, base):
    leaves, shape = random_leaves(TINY, LORA), MixtralConfig.from_hf(TINY)
    config = {"model": shape.model_dump(mode="json"), "lora": LORA.model_dump(mode="json"), "init_from": str(base)}
    step = tmp_path / "run" / "checkpoints" / "7"
    step.parent.mkdir(parents=True)
    state = {"params": adapter_tree(leaves), "step": jnp.int32(7)}
    checkpoint.save(step, state, {"meta": {"config": config}, "dataset": {"next_row": 1}})
    native(tmp_path)
    lora2peft(tmp_path / "run", tmp_path / "peft", progress=False)
    lora2peft(tmp_path / "native", tmp_path / "other", progress=False)
    assert (tmp_path / "peft" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["base_model_name_or_path"] == str(base)


def test_a_router_that_was_trained_beside_adapters_is_merged_whole(tmp_path, base):
    leaves, shape = random_leaves(TINY, LORA), MixtralConfig.from_hf(TINY)
    config = {"model": shape.model_dump(mode="json"), "lora": LORA.model_dump(mode="json")}
    router_LDE = np.random.default_rng(5).standard_normal((2, 24, 4)).astype(np.float32)
    params = adapter_tree(leaves)
    params["layers"]["moe"]["router"] = router_LDE
    checkpoint.save(tmp_path / "7", {"params": params}, {"meta": {"config": config}, "dataset": {}})
    with pytest.raises(ValueError, match="7 holds a trained router too, which is no adapter: use merge-lora"):
        lora2peft(tmp_path / "7", tmp_path / "peft", progress=False)
    merge_lora(base, tmp_path / "merged", adapter=tmp_path / "7", progress=False)
    native(tmp_path)
    merge_lora(base, tmp_path / "other", adapter=tmp_path / "native", progress=False)
    got, want = flat(load_params(tmp_path / "merged")), flat(load_params(tmp_path / "other"))
    assert got.pop("layers.moe.router").tobytes() == router_LDE.tobytes()
    assert all(value.tobytes() == want[name].tobytes() for name, value in got.items())


@pytest.mark.parametrize("kind", ["base", "orbax", "run"])
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["fp32", "bf16"])
def test_merged_weights(tmp_path, kind, dtype):
    write_hub(tmp_path / "base", TINY, random_tensors(TINY, dtype))
    hf2orbax(tmp_path / "base", tmp_path / "orbax", progress=False)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    meta = {"config": {"model": MixtralConfig.from_hf(TINY).model_dump(mode="json")}}
    items = {"meta": meta, "dataset": {}}
    checkpoint.save(tmp_path / "run" / "checkpoints" / "5", {"params": load_params(tmp_path / "base")}, items)
    leaves = native(tmp_path, lora=LORA)
    merge_lora(tmp_path / kind, tmp_path / "merged", adapter=tmp_path / "native", progress=False)
    assert bool(list((tmp_path / "merged").glob("*.safetensors"))) == (kind == "base")
    before, after = (flat(load_params(tmp_path / name)) for name in ("base", "merged"))
    want = merged({k: v.astype(np.float32) for k, v in before.items()} | leaves, LORA.scale)
    for name, value in after.items():
        assert value.dtype == dtype
        if name.startswith(("layers.attention.", "layers.moe.w")):
            spacing = 1e-6 if dtype == np.float32 else 2**-8
            np.testing.assert_allclose(value.astype(np.float32), want[name], rtol=spacing, atol=spacing)
            assert not np.array_equal(value, before[name])
        else:
            assert value.tobytes() == before[name].tobytes()


def flat(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def exported(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    native(tmp_path)
    lora2peft(tmp_path / "native", tmp_path / "peft", progress=False)
    return tmp_path / "peft", load_file(tmp_path / "peft" / WEIGHTS)


def says(directory: Path, **changes) -> None:
    note = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(note | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 4}, r"has shape \[3, 24\], but rank 4 in adapter_config.json and the base ask for \[4, 24\]"),
        ({"r": "many"}, "r, lora_alpha or their patterns are no numbers"),
        ({"r": 0}, "r 0, lora_alpha 5 and lora_dropout 0 must be positive"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA is converted"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "all"}, "bias is 'all': the model has no biases"),
        ({"modules_to_save": ["lm_head"]}, r"missing tensors 1 \(base_model.model.lm_head.weight\); unexpected 0"),
        ({"modules_to_save": ["norm"]}, "modules_to_save names norm, which is not supported: embed_tokens, lm_head"),
        ({"modules_to_save": "lm_head"}, r"are no numbers \(modules_to_save: Input should be a valid list\)"),
        ({"rank_pattern": "q_proj"}, r"are no numbers \(rank_pattern: Input should be a valid dictionary\)"),
        ({"rank_pattern": {"(": 3}}, "are no numbers .*unterminated subpattern"),
        ({"alpha_pattern": {"w2": 0}}, "must be positive"),
        ({"r": True}, r"are no numbers \(r: Input should be a valid integer\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base too"),
        ({"rank_pattern": {"q_proj": 8}}, r"has shape \[3, 24\], but the ranks in .* ask for \[8, 24\]"),
        ({"base_model_name_or_path": "mistralai/Mixtral-8x7B-v0.1"}, "no directory here: say --base"),
        ({"base_model_name_or_path": None}, "names the base None"),
    ],
)
def test_settings_that_are_refused(tmp_path, base, changes, told):
    peft, _ = exported(tmp_path)
    says(peft, **changes)
    with pytest.raises(ValueError, match=told) as caught:
        peft2lora(peft, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["base", "native", "peft"]


def test_tensors_that_do_not_fit(tmp_path, base):
    peft, tensors = exported(tmp_path)
    lost = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight"
    save_file({n: t for n, t in tensors.items() if n != lost}, peft / WEIGHTS)
    with pytest.raises(ValueError, match=f"missing tensors 1 \\({lost}\\); unexpected 0"):
        peft2lora(peft, tmp_path / "out", progress=False)
    gate = "base_model.model.model.layers.0.block_sparse_moe.gate.lora_A.weight"
    save_file(tensors | {gate: np.zeros((3, 24), np.float32)}, peft / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing tensors 3 .*layers\.0\.block_sparse_moe\.gate\.lora_B"):
        peft2lora(peft, tmp_path / "out", progress=False)
    (peft / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}: it is no PEFT adapter in safetensors"):
        peft2lora(peft, tmp_path / "out", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        peft2lora(tmp_path / "nowhere", tmp_path / "out", progress=False)


def test_an_adapter_of_another_base_is_refused(tmp_path, base):
    peft, _ = exported(tmp_path)
    other = {**TINY, "intermediate_size": 28}
    write_hub(tmp_path / "other", other, random_tensors(other))
    with pytest.raises(ValueError, match="of another rank or for another base"):
        peft2lora(peft, tmp_path / "out", base=tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match=f"another base: intermediate_size is 20 for the adapter, 28 in {tmp_path}"):
        merge_lora(tmp_path / "other", tmp_path / "out", adapter=tmp_path / "native", progress=False)
    longer = {**TINY, "vocab_size": 40}
    write_hub(tmp_path / "longer", longer, random_tensors(longer))
    merge_lora(tmp_path / "longer", tmp_path / "out", adapter=tmp_path / "native", progress=False)
    assert read_hub(tmp_path / "out")["lm_head.weight"].shape == (40, 24)


def test_an_embedding_that_is_the_head_too_is_said_to_be(tmp_path):
    tied = {**TINY, "tie_word_embeddings": True}
    write_hub(tmp_path / "base", tied, random_tensors(tied))
    write_hub(tmp_path / "untied", TINY, random_tensors(TINY))
    lora = LoraConfig(rank=3, targets=("attention.query",), modules_to_save=("embed_tokens",))
    leaves = random_leaves(TINY, lora) | {"embed.weight": np.ones((37, 24), np.float32)}
    for name, shape in ("tied", tied), ("native", TINY):
        write_native(tmp_path / name, MixtralConfig.from_hf(shape), lora, leaves, str(tmp_path / "base"))
    lora2peft(tmp_path / "tied", tmp_path / "peft", progress=False)
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["ensure_weight_tying"] is True
    peft2lora(tmp_path / "peft", tmp_path / "back", progress=False)
    says(tmp_path / "peft", ensure_weight_tying=False)
    with pytest.raises(ValueError, match="embed_tokens without ensure_weight_tying, so the head stays the base's"):
        peft2lora(tmp_path / "peft", tmp_path / "out", progress=False)
    says(tmp_path / "peft", modules_to_save=None)  # as saved after resize_token_embeddings: the base's own, tied
    peft2lora(tmp_path / "peft", tmp_path / "resized", progress=False)
    for adapter, base in ("tied", "untied"), ("native", "base"):
        with pytest.raises(ValueError, match="another base: tie_word_embeddings is"):
            merge_lora(tmp_path / base, tmp_path / "out", adapter=tmp_path / adapter, progress=False)


def test_native_directories_that_are_refused(tmp_path):
    leaves, shape = random_leaves(TINY, LORA), MixtralConfig.from_hf(TINY)
    write_native(tmp_path / "rank", shape, LORA.model_copy(update={"rank": 4}), leaves, None)
    with pytest.raises(ValueError, match=r"its LoRA settings \(rank 4\) ask for"):
        lora2peft(tmp_path / "rank", tmp_path / "out", progress=False)
    less = LORA.model_copy(update={"targets": ("attention.*",)})
    write_native(tmp_path / "more", shape, less, leaves, None)
    with pytest.raises(ValueError, match=r"LoRA settings: missing tensors 0; unexpected 6"):
        lora2peft(tmp_path / "more", tmp_path / "out", progress=False)
    (tmp_path / "rank" / "adapter.json").write_text('{"lora": {}}')
    with pytest.raises(ValueError, match=r"adapter\.json does not say what the adapter is: KeyError: 'model'"):
        lora2peft(tmp_path / "rank", tmp_path / "out", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no adapter"):
        lora2peft(tmp_path / "empty", tmp_path / "out", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        lora2peft(tmp_path / "nowhere", tmp_path / "out", progress=False)


def test_a_base_is_still_there_behind_an_export_that_replaces_another(tmp_path, base):
    native(tmp_path)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    peft = tmp_path / "peft"
    lora2peft(tmp_path / "native", peft, progress=False)
    (tmp_path / "old").mkdir()
    held = base.rename(tmp_path / "old" / "base")
    for call, source in ((lora2peft, tmp_path / "native"), (peft2lora, peft)):
        for place in (held, tmp_path / "old"):
            with pytest.raises(ValueError, match=f"{held} is read, and lies in destination {place}"):
                call(source, place, base=held, force=True, progress=False)
    assert {file.name: file.read_bytes() for file in held.iterdir()} == before
    lora2peft(tmp_path / "native", held / "adapter", base=held, progress=False)  # inside it nothing is replaced


def test_the_commands(tmp_path, base, capsys):
    native(tmp_path)
    at = {name: str(tmp_path / name) for name in ("base", "native", "peft", "back", "merged")}
    assert launch.main(["convert", "lora2peft", at["native"], at["peft"]]) == 0
    assert launch.main(["convert", "peft2lora", at["peft"], at["back"], "--base", at["base"]]) == 0
    assert launch.main(["convert", "merge-lora", at["base"], at["merged"], "--adapter", at["back"]]) == 0
    assert not is_adapter(next(iter(read_hub(tmp_path / "merged"))))
    capsys.readouterr()
    assert launch.main(["convert", "lora2peft", at["native"], at["peft"]]) == 2
    assert capsys.readouterr().err == f"error: {at['peft']} exists already; --force replaces it\n"
    assert launch.main(["convert", "lora2peft", at["native"], at["peft"], "--force"]) == 0
