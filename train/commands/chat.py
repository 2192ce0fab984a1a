"""A chat typed by hand: each line is a turn, or a command that begins with a slash."""

import contextlib
import itertools
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.data.progress import say
from mixtral_jax.data.records import write_atomically
from mixtral_jax.generation import stream
from mixtral_jax.model import Mixtral
from mixtral_jax.train.errors import did_you_mean
from mixtral_jax.train.text import Codec

Message = dict[str, Any]
_LINES = 1000  # of the history that is kept
_HELP = """\
/system TEXT  a system prompt from now on; without TEXT: none
/reset        begin anew, with the system prompt
/save FILE    write the conversation, as --turns FILE reads it
/help         this
/quit         end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next; one that begins with a space is always a message."""


class Conversation:
    """The messages so far, and the model that answers."""

    def __init__(self, model: Mixtral, codec: Codec, messages: list[Message], options: dict[str, Any]):
        """`options`: max_new_tokens and those of sampling."""
        self.messages = messages
        self._model, self._codec, self._options = model, codec, options
        self._answers = itertools.count()  # each draws differently, after /reset too
        self._is_long, self._saved = False, set[Path]()

    def take(self, line: str, pressed: list[int]) -> None:
        """Answer a line, as long as nothing is `pressed`, or obey it. EOFError: that was the end."""
        if not line.startswith("/"):
            return self._answer({"role": "user", "content": line}, pressed) if line.strip() else None
        word, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "system": self._set_system, "reset": self._reset, "save": self._save, "help": lambda _: say(_HELP),
            "quit": _quit,
        }  # fmt: skip
        unknown = f"there is no /{word}{did_you_mean(word, commands)}; /help names what there is"
        return commands.get(word, lambda _: say(unknown))(rest.strip())

    def _answer(self, message: Message, pressed: list[int]) -> None:
        asked = [*self.messages, message]
        try:
            ids = self._codec.encode(asked)
        except ValueError as error:
            return say(f"error: {error}")
        self._codec.warn_of_control_words([[message]])
        self._warn_of_length(len(ids))
        new: list[int] = []

        how: dict[str, Any] = {"numbers": [next(self._answers)], "width": _width(len(ids)), **self._options}

        def tokens() -> Iterator[int]:
            for (token,) in stream(self._model, [ids], eos_id=self._codec.ends, **how):
                assert token is not None, "the only row has not ended"
                new.append(token)
                yield token
                if pressed:
                    return

        try:
            text = write(self._codec.grow(asked, ids, tokens()))
        except (FloatingPointError, jax.errors.JaxRuntimeError) as error:  # no memory for one so long, for one
            return say(f"error: no answer: {error}")
        finish = "interrupted" if pressed else self._codec.finish(new)
        if finish != "stop":
            say("(stopped)" if pressed else f"(cut at {len(new)} tokens: --max-new-tokens)")
        if text.strip():
            mark = {} if finish == "stop" else {"finish": finish}
            self.messages = [*asked, {"role": "assistant", "content": text, **mark}]
        else:
            say("(no answer: your message is not kept)")  # an empty one cannot stand in a conversation

    def _warn_of_length(self, tokens: int) -> None:
        limit, most = self._model.config.max_position_embeddings, self._options["max_new_tokens"]
        if tokens + most > limit and not self._is_long:
            self._is_long = True
            say(
                f"note: the conversation has {tokens} tokens and an answer up to {most}, the model was made for "
                f"max_position_embeddings = {limit}: what stands behind them is worth little; /reset begins anew"
            )

    def _set_system(self, text: str) -> None:
        system = [{"role": "system", "content": text}] if text else []
        try:
            self._codec.encode([*system, {"role": "user", "content": ""}])
        except ValueError as error:  # of a template without a place for it
            say(f"error: {error}")
        else:
            self.messages = [*system, *(m for m in self.messages if m["role"] != "system")]

    def _reset(self, _: str) -> None:
        self.messages, self._is_long = [m for m in self.messages if m["role"] == "system"], False

    def _save(self, name: str) -> None:
        file = Path(os.path.expanduser(name)).absolute()
        if not name or not self.messages:
            return say("error: /save needs the name of a file" if not name else "error: nothing is said yet")
        try:
            if file.exists() and file not in self._saved:
                return say(f"error: {name} exists already: name another file")
            write_atomically(file, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            say(f"error: {name}: {error.strerror}")
        else:
            self._saved.add(file)
            say(f"{len(self.messages)} messages in {name}")
        return None


def converse(conversation: Conversation) -> None:
    """Lines from the terminal until Ctrl-D, /quit, or Ctrl-C twice with nothing typed between."""
    with contextlib.suppress(EOFError), _line_editing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt and text reach")  # is said before an answer
        again = False
        while True:
            try:
                line = input("> ")
                while line.endswith("\\"):
                    line = f"{line[:-1]}\n{input('. ')}"
                with _ctrl_c() as pressed:
                    conversation.take(line, pressed)
                again = False  # who presses twice to stop an answer does not mean to end
            except KeyboardInterrupt:
                print()
                if again:
                    return
                say("Ctrl-C again, or Ctrl-D, ends")
                again = True
            except UnicodeDecodeError as error:
                say(f"error: that is not UTF-8 ({error})")


def write(pieces: Iterator[str]) -> str:
    """Print text as it comes; all of it."""
    written = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        written += piece
    print(flush=True)
    return written


def _width(tokens: int) -> int:
    """The next of 256, 1024, 4096, ...: compiling for every turn would take longer than such a prompt."""
    bits = (tokens - 1).bit_length()
    return 1 << max(8, bits + bits % 2)


def _quit(_: str) -> None:
    raise EOFError


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C ends nothing in here: it is put on a list."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrows and history, which a file of the user's keeps, where the system has them."""
    try:
        import readline
    except ImportError:
        yield
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    file = Path(cache, "mixtral-jax", "chat_history")
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.chmod(0o600)
            readline.write_history_file(file)
