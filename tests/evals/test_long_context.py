"""Passkeys and losses by length, against generation and the whole forward pass, and what the command says."""

import gzip
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.data.text.passkey import FILLER, NEEDLE, Passkey, passkey_ids
from mixtral_jax.generation import generate
from mixtral_jax.launch import main
from mixtral_jax.train.commands import long_context
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.evals import long_documents, loss_by_length, passkey_accuracy
from tests.conftest import ROOT
from tests.evals.cases import write_model
from tests.passkey_samples import passkey_text, write_samples
from tests.tiny import WORDS, tiny_config, tiny_model, write_byte_tokenizer

SAMPLES = ROOT / "data" / "samples"


@pytest.fixture(params=["sentencepiece", "bytes"])
def tokenizer(request, tmp_path):
    if request.param == "sentencepiece":
        return load_tokenizer(SAMPLES / "tokenizer.model")
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_a_prompt_has_its_length_and_the_key_its_depth(tokenizer, depth) -> None:
    for length in (400, 401, 777):
        prompt, answer = passkey_ids(tokenizer, 12345, length, depth)
        assert len(prompt) + len(answer) == length and prompt[0] == tokenizer.bos_id
        text = tokenizer.decode(prompt[1:])
        before, after = (part.count(FILLER[:9]) for part in text.split(NEEDLE.format(key=12345)))
        assert abs(before - depth * (before + after)) <= 1
        assert tokenizer.decode([*prompt[1:], *answer]).endswith("The pass key is 12345")


def test_what_is_learned_is_what_is_asked(tokenizer) -> None:
    """The ids of a prompt that is made of whole words are those of its text."""
    text = passkey_text(54321, 19, 38)
    whole = [tokenizer.bos_id, *tokenizer.encode(text["prompt"] + text["completion"])]
    sizes = [len(tokenizer.encode(f"\n{' '.join([FILLER] * n)}", "text")) for n in (1, 2)]
    prompt, answer = passkey_ids(tokenizer, 54321, len(whole), sizes[0] / sum(sizes))
    assert prompt + answer == whole


def test_the_samples_are_made_again_byte_for_byte(tmp_path) -> None:
    write_samples(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    for file in files:
        assert gzip.decompress(file.read_bytes()) == gzip.decompress((SAMPLES / "sft" / file.name).read_bytes())


def test_a_key_is_found_where_greedy_decoding_writes_it(monkeypatch) -> None:
    """Prompts of random tokens: deep ones with what the model writes, the others with another last token."""
    model, rng = tiny_model(tiny_config(vocab_size=97)), np.random.default_rng(0)

    def ask(_: object, key: int, length: int, depth: float) -> Passkey:
        prompt = rng.integers(1, 97, length - 3).tolist()
        answer = generate(model, prompt, max_new_tokens=3)
        return Passkey(prompt, answer if depth else [*answer[:2], answer[2] % 96 + 1])

    monkeypatch.setattr("mixtral_jax.train.evals.passkey.passkey_ids", ask)
    assert passkey_accuracy(model, None, lengths=[9], depths=[0], samples=1, seed=-1)["seed"] == -1
    found = passkey_accuracy(model, None, lengths=[9, 16], depths=[0, 1], samples=2, seed=0)
    assert found == {"lengths": [9, 16], "depths": [0, 1], "samples": 2, "seed": 0, "accuracy": [[0, 0], [1, 1]]}


def test_losses_are_those_of_the_whole_forward_pass(tmp_path) -> None:
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, words)) + "." * 40 for words in (9, 20, 2, 8)]
    documents, lengths = long_documents(iter(texts), tokenizer, [16, 32, 64, 4096], samples=2)
    assert lengths == [16, 32, 64] and [len(document.ids) for document in documents] == [64, 64]
    assert [int(document.bytes_T.sum()) for document in documents] == [63, 63]
    model = tiny_model(tiny_config(vocab_size=tokenizer.vocab_size))
    found = loss_by_length(model, tokenizer, documents, lengths)

    def nll(ids: list[int]) -> np.ndarray:
        logps_TV = jax.nn.log_softmax(model(np.array([ids]))[0])
        return -np.asarray(logps_TV)[np.arange(len(ids) - 1), ids[1:]]

    whole = np.stack([np.append(0, nll(document.ids)) for document in documents])
    for (a, b), stretch in zip([(1, 16), (16, 32), (32, 64)], found["position"], strict=True):
        assert stretch["tokens"] == 2 * (b - a) and (stretch["from"], stretch["to"]) == (a // 16 * 16, b)
        assert stretch["nll"] == pytest.approx(whole[:, a:b].mean(), rel=1e-5)
        assert stretch["bits_per_byte"] == pytest.approx(whole[:, a:b].sum() / math.log(2) / (2 * (b - a)), rel=1e-5)
    for length, context in zip(lengths, found["context"], strict=True):
        rows = [[tokenizer.bos_id, *document.ids[1 - length :]] for document in documents]
        want = np.mean([nll(row)[-8:] for row in rows])
        assert (context["length"], context["tokens"]) == (length, 16)
        assert context["nll"] == pytest.approx(want, rel=1e-5) and context["perplexity"] == pytest.approx(
            np.exp(want), rel=1e-4
        )


def test_bytes_are_those_of_the_text(tokenizer) -> None:
    text = "Dans la boîte de dialogue, vous pouvez — 日本"
    (document,), _ = long_documents([text], tokenizer, [2, 4096], 1)
    assert document.ids[1:] == tokenizer.encode(text)[:1] and 0 < document.bytes_T[1] <= 4
    (document,), _ = long_documents([text], tokenizer, [len(tokenizer.encode(text)) + 1], 1)
    assert document.bytes_T.sum() == len(text.encode()) and document.bytes_T[0] == 0


def test_documents_that_are_too_short_are_told(tokenizer) -> None:
    with pytest.raises(UserError, match=r"the longest document has \d+ tokens, and the shortest of --lengths is 128"):
        long_documents(["short", "too"], tokenizer, [128, 256], 3)


def test_the_command_prints_and_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_model(tmp_path / "hf")
    (tmp_path / "long.txt").write_text("the router sends each token " * 30)
    words = ["eval", str(tmp_path / "hf"), "--passkey", "--by-length", str(tmp_path / "long.txt"), "--samples", "1"]
    assert main([*words, "--lengths", "400,440", "--depths", "0,1", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Keys found" in printed and "440" in printed and "100%" in printed and "bits/byte" in printed
    for name, keys in (("passkey", {"accuracy"}), ("by_length", {"position", "context"})):
        assert keys < json.loads((tmp_path / "out" / f"{name}.json").read_text()).keys()


def test_documents_and_the_place_are_looked_at_before_the_model(tmp_path, capsys, monkeypatch) -> None:
    write_model(tmp_path / "hf")
    (tmp_path / "short.txt").write_text("short")
    monkeypatch.setattr(long_context, "model_of", None)
    for options, message in (
        (["--by-length", str(tmp_path / "short.txt")], "the longest document has 6 tokens"),
        (["--out", str(tmp_path / "short.txt")], "short.txt cannot be made (File exists): --out names where to write"),
    ):
        assert main(["eval", str(tmp_path / "hf"), "--passkey", "--lengths", "400", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--passkey", "--depths", "0,1.5"], "--depths has 1.5: they are from 0 to 1"),
        (["--passkey", "--lengths", "1"], "--lengths has 1: a text has at least 2 tokens"),
        (["--by-length", "x.txt", "--seed", "0"], "--depths and --seed are for --passkey, which is not there"),
        (["--passkey", "--samples", "0"], "--samples is 0: it is at least 1"),
        (["--seed", "3"], "--lengths, --depths, --samples and --seed are for --passkey and --by-length"),
        (["--passkey", "--lengths", "20"], "a length of 20 is too short: task, key and question alone take"),
        (["--by-length", "nowhere.txt"], "nowhere.txt"),
        (["--passkey", "--tasks", "boolq"], "--passkey and --by-length go without --tasks"),
        (["--by-length", "nowhere.txt", "--limit", "3"], "--passkey and --by-length go without --tasks"),
    ],
)
def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    write_model(tmp_path / "hf")
    assert main(["eval", str(tmp_path / "hf"), *options]) == 2
    assert message in capsys.readouterr().err
