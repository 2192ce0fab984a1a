"""`generate`: text from prompts, answers in a chat, or a file of either."""

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.config import ComputeConfig
from mixtral_jax.data.progress import say
from mixtral_jax.data.text import ends_of
from mixtral_jax.generation import check_options
from mixtral_jax.model import Mixtral, compute_dtype
from mixtral_jax.train.commands.batch import complete, read_prompts
from mixtral_jax.train.commands.chat import Conversation, converse, write
from mixtral_jax.train.errors import UserError, command
from mixtral_jax.train.read_model import read_model, read_tokenizer, run_template
from mixtral_jax.train.text import Codec


def generate(
    checkpoint: str, *, prompt: Sequence[str] | None = None, prompts: str | None = None, out: str | None = None,
    samples: int = 1, batch_size: int = 16, chat: bool = False, system: str | None = None, turns: str | None = None,
    template: str | None = None, tokenizer: str | None = None, dtype: Any = None, **options: Any,
) -> int:  # fmt: skip
    """Print continuations of prompts, or answers to them as a user's messages. One prompt appears as it is written.

    Args:
        checkpoint: an Orbax or Hugging Face directory, a run, or one of its steps.
        prompt: None: standard input is one prompt; typed by hand in a chat, each line is a turn.
        prompts: a file of them, whose continuations go into the file `out`; see batch.py.
        samples, batch_size: of that: continuations of each prompt, and how many are made at once.
        system: the system prompt of a chat.
        turns: a file with the messages of a chat so far, as a JSON list, an object with `messages`, or one a line; the
            answer to its last one is asked for, or to each prompt after it.
        template: chat format; None: that of the run, else of the tokenizer's directory, else by its control tokens.
        tokenizer: None: that in the directory, else that of the run.
        options: max_new_tokens, temperature, top_k, top_p, seed.

    Raises:
        ValueError: an option is out of range.
        UserError: no tokenizer is found or it does not fit the model, a file holds no messages or prompts; batch.py's.
    """
    before = [{"role": "system", "content": system}] if system is not None else []
    before += read_turns(turns) if turns is not None else []
    if before and not chat:
        raise UserError("--system and --turns belong to a chat: add --chat")
    check_options(**options)
    _check_files(prompt, prompts, out, samples, batch_size)
    with _notes(), command() if out is not None else contextlib.nullcontext():
        own = run_template(checkpoint)  # a checkpoint that is not there is said before a tokenizer that is not
        found = read_tokenizer(tokenizer or checkpoint)
        found.ends += ends_of(Path(checkpoint))  # the model's, whosever tokenizer it is
        for note in found.notes:
            say(f"note: {note}")
        file = [] if prompts is None else read_prompts(prompts, before, chat=chat)
        texts = [] if file else _texts(prompt, before, chat)
        typed = [""] if texts is None else texts
        asked: list[Any] = [[*before, {"role": "user", "content": each}] if chat else each for each in typed]
        asked = [each.asked for each in file] or asked or [before]
        if template is not None and all(isinstance(each, str) for each in asked):
            raise UserError("--template is a chat's, and the prompts are text: add --chat")
        model = _model(checkpoint, dtype)
        codec = Codec(model, found, template or own, asked)
        if out is not None:
            complete(model, codec, file, Path(out), samples=samples, batch_size=batch_size, **options)
            print(f"{len(file) * samples} continuations in {out}")
        elif texts is None:
            drawn = ", ".join(f"{name} {value}" for name, value in options.items())
            say(f"chat with {checkpoint}: {drawn}; /help names the commands")
            converse(Conversation(model, codec, before, options))
        elif len(asked) == 1:
            print("" if chat else texts[0], end="", flush=True)
            write(codec.stream(model, asked[0], **options))
        else:
            answers, joint = codec.generate(model, asked, **options), "\n" if chat else ""
            for number, pair in enumerate(zip(texts, answers, strict=True), 1):
                print(f"--- {number} ---", joint.join(pair), sep="\n")
    return 0


def _model(checkpoint: str, dtype: Any) -> Mixtral:
    compute = ComputeConfig(dtype=dtype or "auto")
    whole = compute_dtype(compute.dtype) == "float32"  # cast once; lower precisions keep the router as it is on disk
    return read_model(checkpoint, dtype="float32" if whole else None, compute=compute)


def _texts(prompt: Sequence[str] | None, before: Sequence[Any], chat: bool) -> list[str] | None:
    """What is asked behind the turns so far; nothing where these ask already; None: it will be typed."""
    if prompt is not None:
        return list(prompt)
    if before and before[-1]["role"] in ("user", "tool"):
        return []
    try:
        return None if chat and sys.stdin.isatty() else [sys.stdin.read().rstrip("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error})") from None


def _check_files(prompt: Any, prompts: str | None, out: str | None, samples: int, batch_size: int) -> None:
    if (prompts is None) != (out is None):
        raise UserError("--prompts FILE and --out FILE belong together")
    if prompts is None and (samples, batch_size) != (1, 16):
        raise UserError("--samples and --batch-size belong to --prompts FILE --out FILE")
    if prompts is not None and prompt is not None:
        raise UserError("--prompt and --prompts: give one of them")
    for option, value in (("--samples", samples), ("--batch-size", batch_size)):
        if value < 1:
            raise UserError(f"{option} is {value}: it must be at least 1")
    if out is not None and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        raise UserError(f"--out {out} is a directory, or in none that is there")


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Warnings are lines on stderr, each once, whatever numbers it has."""
    said = set()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if (words := re.sub(r"\d+", "", str(message))) not in said:
            said.add(words)
            say(f"note: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def read_turns(file: str) -> list[dict[str, Any]]:
    """The messages in a file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--turns {file} cannot be read ({error})") from None
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise UserError(f"--turns {file} is no JSON ({error})") from None
    if isinstance(found, dict):
        if beside := [key for key in ("system", "tools") if found.get(key) and "messages" in found]:
            raise UserError(f"--turns {file}: {beside[0]!r} stands beside the messages: --prompts FILE --chat reads it")
        found = found.get("messages", [found])
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) and "role" in m for m in found):
        raise UserError(f'--turns {file} must hold messages, such as [{{"role": "user", "content": "Hello"}}]')
    return found
