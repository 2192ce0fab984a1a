"""A chat typed by hand: on a terminal of its own, and line by line around a model that says what it is told to."""

import builtins
import functools
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.train.commands import chat
from mixtral_jax.train.commands.generate import _texts, read_turns
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.text import Codec
from tests.prepared import MODEL
from tests.sources import ROOT
from tests.tiny import tiny_config


class Terminal:
    """The other side of a chat's terminal."""

    def __init__(self, directory: Path):
        self.side, own = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.chatting", str(directory)],
            stdin=own, stdout=own, stderr=own, start_new_session=True, cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(directory / "cache"), "TERM": "dumb"},
        )  # fmt: skip
        os.close(own)

    def until(self, what: str, seconds: float = 120) -> str:
        """What it says up to `what`."""
        said, end = b"", time.monotonic() + seconds
        while what.encode() not in said:
            assert select.select([self.side], [], [], max(0, end - time.monotonic()))[0], said[-500:]
            said += os.read(self.side, 1)
        return said.decode(errors="replace")

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, where Python hears it asleep; on its way to sleep it would hear it at the next key."""
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0] != "S":
            assert self.process.poll() is None
            time.sleep(0.01)
        self.type("\x03")

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    it = Terminal(tmp_path)
    yield it
    it.process.kill()
    it.process.wait()
    os.close(it.side)


def test_a_chat_on_a_terminal(tmp_path: Path, terminal: Terminal) -> None:
    it = terminal
    it.until("> ")
    it.type("hello\n")
    it.until("hello\r\n")
    assert os.read(it.side, 1)  # the answer has begun, and would take 3,000 tokens
    it.type("\x03")
    it.until("(stopped)\r\n")
    it.until("> ")
    it.type("/system Be kind.\n/save chat.json\n")
    it.until("3 messages in chat.json")
    it.type("/reset\n/nope\n")
    it.until("there is no /nope; /help names")
    it.type("/save again.json\n")
    it.until("1 messages in again.json")
    it.until("> ")
    it.type("half a line")
    it.until("half a line")
    it.interrupt()
    it.until("Ctrl-C again, or Ctrl-D, ends")
    it.until("> ")  # typed before it, between two prompts, Ctrl-D would be lost
    it.type("\x04")
    assert it.process.wait(60) == 0
    system, asked, answer = read_turns(str(tmp_path / "chat.json"))
    assert system["content"] == "Be kind." and asked == {"role": "user", "content": "hello"}
    assert answer["finish"] == "interrupted" and answer["content"]
    assert read_turns(str(tmp_path / "again.json")) == [system]
    history = tmp_path / "cache" / "mixtral-jax" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "hello\n" in history.read_text()


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a chat on lines; gives it and what the model was asked, whose answers are what `says` holds."""
    tokenizer = load_tokenizer(MODEL)
    model: Any = SimpleNamespace(config=tiny_config(vocab_size=4224, max_position_embeddings=64))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # no history can be kept there

    def run(*lines: str, says: str = " Good.", template: Any = "v1", most: int = 8, happens: Any = ()) -> tuple:
        asked: list[dict[str, Any]] = []
        events = iter(happens)

        def stream(_: Any, ids: list[list[int]], **options: Any) -> Iterator[list[int]]:
            asked.append({"text": tokenizer.decode(ids[0]), **options})
            next(events, lambda: None)()
            return ([token] for token in [*tokenizer.encode(says, "text"), tokenizer.eos_id][:most])

        left = iter(lines)

        def typed(_: str) -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(chat, "stream", stream)
        monkeypatch.setattr(builtins, "input", typed)
        codec = Codec(model, tokenizer, template, [[{"role": "user", "content": ""}]])
        conversation = chat.Conversation(model, codec, [], {"max_new_tokens": most})
        chat.converse(conversation)
        return conversation, asked

    return run


def test_turns_follow_each_other_and_draw_differently(talk: Any) -> None:
    conversation, asked = talk("One", "", "Two \\", "lines", "/quit", "Three")
    assert [m["content"].strip() for m in conversation.messages] == ["One", "Good.", "Two \nlines", "Good."]
    assert [each["numbers"] for each in asked] == [[0], [1]] and {each["width"] for each in asked} == {256}
    assert "One" in asked[1]["text"] and "Good." in asked[1]["text"] and asked[1]["text"].count("lines") == 1


def test_a_system_prompt_comes_and_goes(talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    conversation, asked = talk("/system Be kind.", "One", "/reset", "Two", "/system", "Three", "/sistem x")
    assert ["Be kind." in each["text"] for each in asked] == [True, True, False]
    assert "One" not in asked[1]["text"] and "Two" in asked[2]["text"]
    assert "there is no /sistem; did you mean system?" in capsys.readouterr().err
    conversation, _ = talk("/system Be kind.", template={"name": "zephyr", "system": "refuse"})
    assert conversation.messages == [] and "error: " in capsys.readouterr().err


def test_an_answer_that_is_cut_says_so_and_an_empty_one_is_not_kept(
    talk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation, _ = talk("One", most=2)
    assert conversation.messages[-1]["finish"] == "length"
    assert "(cut at 2 tokens: --max-new-tokens)" in capsys.readouterr().err
    conversation, _ = talk("One", says="")
    assert conversation.messages == [] and "your message is not kept" in capsys.readouterr().err


def test_a_conversation_near_the_end_of_the_positions_is_told_once(
    talk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talk("One", *["Open the file and close it. " * 3] * 2, "Two", "/reset", "Three")
    assert capsys.readouterr().err.count("max_position_embeddings = 64") == 1


def test_what_is_saved_replaces_only_its_own(
    talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("mine")
    talk("/save a", "One", "/save", "/save a", "Two", "/save a", "/save other", "/save no/where", f"/save {'x' * 300}")
    assert len(read_turns("a")) == 4 and (tmp_path / "other").read_text() == "mine"
    said = capsys.readouterr().err
    for sentence in (
        "nothing is said yet",
        "needs the name of a file",
        "other exists already",
        "no/where: No such",
        f"{'x' * 300}: File name too long",
    ):
        assert f"error: {sentence}" in said or f"error: /save {sentence}" in said


@pytest.mark.parametrize(("lines", "left"), [(["^C", "^C", "One"], 0), (["^C", "One", "^C", "Two"], 4)])
def test_a_second_ctrl_c_with_nothing_between_ends(talk: Any, lines: list[str], left: int) -> None:
    assert len(talk(*lines)[0].messages) == left


def test_a_second_ctrl_c_in_an_answer_does_not_end(talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    press = functools.partial(signal.raise_signal, signal.SIGINT)
    conversation, _ = talk("One", "^C", "Two", happens=[press])
    assert [m.get("finish") for m in conversation.messages] == [None, "interrupted", None, None]
    assert "(stopped)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [FloatingPointError("NaN"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: big")])
def test_no_failure_of_an_answer_loses_the_conversation(
    talk: Any, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    conversation, _ = talk("One", "Two", "Three", happens=[lambda: None, fail])
    assert [m["content"].strip() for m in conversation.messages] == ["One", "Good.", "Three", "Good."]
    assert f"error: no answer: {error}" in capsys.readouterr().err


def test_turns_in_a_file_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = {"role": "user", "content": "a\u2028b"}
    (tmp_path / "turns.jsonl").write_text(f"{json.dumps(turn, ensure_ascii=False)}\n" * 2, encoding="utf-8")
    assert read_turns(str(tmp_path / "turns.jsonl")) == [turn, turn]  # a line ends at no other character
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        _texts(None, [], chat=False)


def test_conversations_of_like_lengths_share_a_program() -> None:
    widths = [chat._width(tokens) for tokens in (1, 256, 257, 1024, 1025, 4097)]
    assert widths == [256, 256, 1024, 1024, 4096, 16384]
