"""Texts and chats to ids and back, around a model that says what it is told to."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.generation import engine
from mixtral_jax.train import text
from mixtral_jax.train.commands import generate as command
from mixtral_jax.train.errors import UserError
from tests.prepared import MODEL
from tests.tiny import tiny_config

ANSWER = " file, then <x>"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model was asked; it always goes on with ANSWER, an id without a piece, and EOS."""
    tokenizer, asked = load_tokenizer(MODEL), {}
    new = [*tokenizer.encode(ANSWER, "text"), 4200, tokenizer.eos_id]

    def generate(model: Any, ids: list[list[int]], **options: Any) -> list[list[int]]:
        asked.update(options, ids=ids)
        return [new for _ in ids]

    def stream(model: Any, ids: list[list[int]], **options: Any) -> Any:
        asked.update(options, ids=ids)
        return ([token] for token in new)

    monkeypatch.setattr(text, "generate_tokens", generate)
    monkeypatch.setattr(text, "stream_tokens", stream)
    return asked


def model(vocab_size: int = 4224) -> Any:
    return SimpleNamespace(config=tiny_config(vocab_size=vocab_size, max_position_embeddings=64))


def test_a_list_of_prompts_reads_as_each_of_them_alone(said: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(MODEL)
    want = f"{ANSWER}⟨4200⟩"
    assert text.generate(model(), "Select the", tokenizer=tokenizer) == want
    assert text.generate(model(), ["Select the", "Click"], tokenizer=tokenizer) == [want, want]
    assert "".join(text.Codec(model(), tokenizer, None, ["Select the"]).stream(model(), "Select the")) == want


def test_generation_ends_where_generation_config_says(said: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.ends = (2, 7, 9999)
    text.generate(model(), "Select", tokenizer=tokenizer)
    assert said["eos_id"] == [2, 7]


def test_typed_control_tokens_are_letters_and_are_warned_of_once(said: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(MODEL)
    with pytest.warns(UserWarning, match=r"the prompts hold <s>, </s> \(3 in all\) as text") as caught:
        text.generate(model(), ["<s>Hello</s>", "<s> two"], tokenizer=tokenizer)
    assert len(caught) == 1 and all(ids.count(1) == 1 and 2 not in ids for ids in said["ids"])
    chat = [{"role": "user", "content": "[INST] Hello [/INST]"}]
    with pytest.warns(UserWarning, match=r"hold \[INST\], \[/INST\] \(2 in all\)"):
        text.generate(model(), chat, tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.generate(model(), "[INST] Hello [/INST]", tokenizer=tokenizer)  # what v1 writes: no control tokens


def test_positions_past_those_of_the_model_are_warned_of() -> None:
    engine._warn_of_length(model(), 64)
    with pytest.warns(UserWarning, match="reach 65 tokens, the model was made for max_position_embeddings = 64"):
        engine._warn_of_length(model(), 65)


@pytest.mark.parametrize(
    "content",
    [
        '[{"role": "user", "content": "a"}]',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"role": "user", "content": "a"}\n',
        '\ufeff{"role": "user", "content": "a"}\n\n{"role": "assistant", "content": "b"}\n',
    ],
)
def test_a_file_of_turns(tmp_path: Path, content: str) -> None:
    (tmp_path / "t").write_text(content)
    turns = command.read_turns(str(tmp_path / "t"))
    assert [turn["role"] for turn in turns] == ["user", "assistant"][: content.count('"role"')]


@pytest.mark.parametrize("beside", [{"system": "S"}, {"tools": [{"name": "f"}]}])
def test_what_stands_beside_the_turns_is_not_dropped(tmp_path: Path, beside: dict[str, Any]) -> None:
    (tmp_path / "t").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}], **beside}))
    with pytest.raises(UserError, match="stands beside the messages: --prompts FILE --chat reads it"):
        command.read_turns(str(tmp_path / "t"))


@pytest.mark.parametrize("content", ["", "[]", "hello", '["a"]', '{"text": "a"}', "3"])
def test_a_file_without_turns_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t").write_text(content)
    with pytest.raises(UserError, match=r"--turns .*t "):
        command.read_turns(str(tmp_path / "t"))
    with pytest.raises(UserError, match="cannot be read"):
        command.read_turns(str(tmp_path / "nothing"))


def test_a_chat_of_a_system_prompt_turns_and_prompts(
    tmp_path: Path, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "read_model", lambda *_, **__: model())
    monkeypatch.setattr(command, "run_template", lambda _: None)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "t").write_text(json.dumps(turns))
    options: dict[str, Any] = {"tokenizer": str(MODEL), "chat": True, "system": "Be kind."}
    tokenizer = load_tokenizer(MODEL)

    def first(text: str) -> list[int]:
        return [1, *tokenizer.encode(text)]

    assert command.generate("m", turns=str(tmp_path / "t"), **options) == 0
    (ids,) = said["ids"]
    assert ids[: len(first("[INST] Be kind.\n\na [/INST]"))] == first("[INST] Be kind.\n\na [/INST]")
    assert ids[-len(tokenizer.encode("[INST] c [/INST]")) :] == tokenizer.encode("[INST] c [/INST]")
    assert command.generate("m", prompt=["x"], **options) == 0
    assert said["ids"] == [first("[INST] Be kind.\n\nx [/INST]")]
    assert capsys.readouterr().out.count(ANSWER.strip()) == 2
    with pytest.raises(UserError, match="--system and --turns belong to a chat: add --chat"):
        command.generate("m", prompt=["x"], system="Be kind.")
