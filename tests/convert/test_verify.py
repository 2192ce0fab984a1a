"""verify: equal checkpoints pass, and what differs is named."""

import importlib.util
import json
import re

import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.convert import hf2orbax, resize_vocab, verify
from mixtral_jax.convert.compare import Outputs, compare_logits, compare_tokenizers
from tests.convert_files import BF16, DENSE, TINY, random_tensors, write_hub
from tests.prepared import MODEL

NAME = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch):
    """Seconds of import; tests/parity has it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("shape", [TINY, DENSE], ids=["mixtral", "dense"])
def test_converted_checkpoints_are_identical(tmp_path, shape):
    tensors = random_tensors(shape, BF16)
    write_hub(tmp_path / "hf", shape, tensors)
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    report = verify(tmp_path / "hf", tmp_path / "orbax", prompts=[[1, 2, 3], [4, 5]])
    assert report.identical and not report.different_tensors
    (pair,) = report.logits
    assert (pair.max_abs, pair.kl, pair.top1_agreement) == (0.0, 0.0, 1.0)
    assert pair.router_agreement == (None if shape is DENSE else 1.0)
    assert "transformers is not installed" in report.notes[0]
    assert report.lines()[-1] == "identical"
    assert f"tensors: {len(tensors)} of {len(tensors)} bit-equal" in report.lines()
    assert json.loads(json.dumps(report.to_json()))["identical"] is True


def test_the_worst_offenders_are_named_first(tmp_path):
    tensors = random_tensors(TINY)
    write_hub(tmp_path / "a", TINY, tensors)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(0.25)
    tensors[NAME] = tensors[NAME].copy()
    tensors[NAME][3, 4] += np.float32(2.0)
    write_hub(tmp_path / "b", TINY, tensors)
    report = verify(tmp_path / "a", tmp_path / "b", prompts=[[1, 2, 3]])
    assert not report.identical
    assert [d.name for d in report.different_tensors] == [NAME, "model.norm.weight"]
    np.testing.assert_allclose([d.max_abs for d in report.different_tensors], [2.0, 0.25], rtol=1e-6)
    assert report.logits[0].max_abs > 0 and report.logits[0].kl > 0
    assert report.lines()[-1] == "DIFFERENT" and any(NAME in line for line in report.lines())


def test_swapped_halves_and_negative_zero_are_differences(tmp_path):
    tensors = random_tensors(TINY)
    tensors["model.norm.weight"][0] = 0.0
    write_hub(tmp_path / "a", TINY, tensors)
    w1 = NAME.replace("w3", "w1")
    swapped = {
        **tensors,
        NAME: tensors[w1],
        w1: tensors[NAME],
        "model.norm.weight": tensors["model.norm.weight"].copy(),
    }
    swapped["model.norm.weight"][0] = -0.0
    write_hub(tmp_path / "b", TINY, swapped)
    report = verify(tmp_path / "a", tmp_path / "b", prompts=[[1, 2]])
    assert {d.name for d in report.different_tensors} == {NAME, w1, "model.norm.weight"}
    assert report.different_tensors[-1].max_abs == 0.0 and report.different_tensors[-1].reason == "bits differ"


def test_other_dtype_configuration_and_vocabulary(tmp_path):
    tensors = random_tensors(TINY)
    write_hub(tmp_path / "a", TINY, tensors)
    hf2orbax(tmp_path / "a", tmp_path / "b", dtype="bfloat16", progress=False)
    report = verify(tmp_path / "a", tmp_path / "b", prompts=[[1, 2]])
    assert len(report.different_tensors) == len(tensors)
    assert report.different_tensors[0].reason == "float32 in A, bfloat16 in B"
    write_hub(tmp_path / "c", {**TINY, "num_experts_per_tok": 3}, tensors)
    report = verify(tmp_path / "a", tmp_path / "c", prompts=[[1, 2]])
    assert report.config == {"num_experts_per_tok": (2, 3)} and not report.different_tensors and not report.identical
    resize_vocab(tmp_path / "a", tmp_path / "d", vocab_size=64, progress=False)
    report = verify(tmp_path / "a", tmp_path / "d")
    assert {d.name for d in report.different_tensors} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert report.notes == ["logits not compared: the vocabularies differ"]
    for layers in (1, TINY["num_hidden_layers"] + 1):
        shape = {**TINY, "num_hidden_layers": layers}
        write_hub(tmp_path / f"layers{layers}", shape, random_tensors(shape))
        report = verify(tmp_path / "a", tmp_path / f"layers{layers}", prompts=[[1]])
        assert any(d.reason == ("only in A" if layers == 1 else "only in B") for d in report.different_tensors)
        assert report.logits[0].router_agreement is None and not report.identical


def test_prompts_from_a_file(tmp_path):
    write_hub(tmp_path / "a", TINY, random_tensors(TINY))
    (tmp_path / "ids").write_text("[1, 2, 3]\n\n[4]\n")
    assert verify(tmp_path / "a", tmp_path / "a", prompts=tmp_path / "ids").identical
    (tmp_path / "ids").write_text("[99]\n")
    with pytest.raises(ValueError, match="token id 99, the vocabulary has 37"):
        verify(tmp_path / "a", tmp_path / "a", prompts=tmp_path / "ids")
    (tmp_path / "ids").write_text("hello\n")
    with pytest.raises(ValueError, match=r"the checkpoint has neither tokenizer\.json nor tokenizer\.model"):
        verify(tmp_path / "a", tmp_path / "a", prompts=tmp_path / "ids")
    for text in ("[INST] hello [/INST]", '["a"]', "[1.5, 2]", "[1, 2"):  # text, which no tokenizer is here for
        (tmp_path / "ids").write_text(f"[1]\n{text}\n")
        with pytest.raises(ValueError, match="the prompts are text"):
            verify(tmp_path / "a", tmp_path / "a", prompts=tmp_path / "ids")
    (tmp_path / "ids").write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        verify(tmp_path / "a", tmp_path / "a", prompts=tmp_path / "ids")


def test_figures_of_two_distributions():
    """KL, agreement and tolerance by their definitions, on numbers that a person can follow."""
    p = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    q = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    experts = np.array([[[0, 1], [2, 3]]])
    swapped = np.array([[[1, 0], [2, 0]]])
    pair = compare_logits("a", "b", Outputs(p + 3, experts), Outputs(q, swapped), tolerance=1.0)
    np.testing.assert_allclose(pair.kl, (0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert pair.top1_agreement == 0.5 and pair.router_agreement == 0.75
    assert not pair.same and pair.spread == pytest.approx((p[0].std() + p[1].std()) / 2) == pair.allowed
    small = [Outputs(1e-6 * x, None) for x in (p, p + 0.01 * q)]  # of a tiny model, 1e-2 apart and as good as 0
    assert not compare_logits("a", "b", *small, tolerance=1e-3).same
    assert compare_logits("a", "b", Outputs(p, None), Outputs(p, None), tolerance=0.0).same


def test_tokenizers_are_compared(tmp_path):
    ours = mj.tokenizer_files(MODEL)
    assert compare_tokenizers(tmp_path, tmp_path, ours, {"tokenizer.model": MODEL.read_bytes()}) == ([], [])
    theirs = json.loads(ours["tokenizer.json"])
    del theirs["normalizer"]["normalizers"][0]  # no space in front, as transformers 5 reads a tokenizer.model alone
    other = {"tokenizer.json": json.dumps(theirs).encode()}
    (line,), notes = compare_tokenizers(tmp_path, tmp_path, ours, other)
    assert line.startswith("tokenizer: 'The router' is [") and line.endswith("in B") and not notes
    assert compare_tokenizers(tmp_path, tmp_path, ours, {}) == (["tokenizer: B has none that can be read"], [])
    assert compare_tokenizers(tmp_path, tmp_path, {}, {}) == ([], [])
    assert "is not a tokenizer.json" in compare_tokenizers(tmp_path, tmp_path, ours, {"tokenizer.json": b"{}"})[1][0]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("tokenizer_config.json", {"eos_token": "<unk>"}, "'EOS' is 2 in A, 0 in B"),
        ("tokenizer_config.json", {"bos_token": "<unk>"}, r"'The router' is \[1, .* in A, \[0, .* in B"),
        ("generation_config.json", {"eos_token_id": [2, 7]}, r"'what ends a text' is \[2\] in A, \[2, 7\] in B"),
        ("chat_template.jinja", "{{ bos_token }}{{ messages[0].content }}", "'a chat' is .* in A, '{{ bos_token }}"),
    ],
)
def test_what_else_tokenizers_say_is_compared(tmp_path, name, changes, told):
    ours = mj.tokenizer_files(MODEL, "zephyr")
    changed = changes if isinstance(changes, str) else json.dumps(json.loads(ours[name]) | changes)
    lines, notes = compare_tokenizers(tmp_path, tmp_path, ours, ours | {name: changed.encode()})
    assert len(lines) == 1 and re.match(f"tokenizer: {told}", lines[0]) and not notes
