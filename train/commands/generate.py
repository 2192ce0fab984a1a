"""`generate`: text from prompts, or answers in a chat."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.config import ComputeConfig
from mixtral_jax.model import compute_dtype
from mixtral_jax.train import text
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.read_model import read_model, read_tokenizer, run_template


def generate(
    checkpoint: str,
    *,
    prompts: Sequence[str] | None = None,
    chat: bool = False,
    system: str | None = None,
    turns: str | None = None,
    template: str | None = None,
    tokenizer: str | None = None,
    dtype: Any = None,
    **options: Any,
) -> int:
    """Print continuations of prompts, or answers to them as a user's messages. One prompt appears as it is written.

    Args:
        checkpoint: an Orbax or Hugging Face directory, a run, or one of its steps.
        prompts: None: standard input is one prompt; typed by hand in a chat, each line is a turn.
        system: the system prompt of a chat.
        turns: a file with the messages of a chat so far, as a JSON list, an object with `messages`, or one a line; the
            answer to its last one is asked for, or to each prompt after it.
        template: chat format; None: that of the run, else of the tokenizer's directory, else by its control tokens.
        tokenizer: None: that in the directory, else that of the run.
        options: max_new_tokens, temperature, top_k, top_p, seed.

    Raises:
        UserError: no tokenizer is found, it does not fit the model, or `turns` holds no messages.
    """
    before = [{"role": "system", "content": system}] if system is not None else []
    before += read_turns(turns) if turns is not None else []
    if before and not chat:
        raise UserError("--system and --turns belong to a chat: add --chat")
    own = run_template(checkpoint)  # a checkpoint that is not there is said before a tokenizer that is not
    options["tokenizer"] = read_tokenizer(tokenizer or checkpoint)
    for note in options["tokenizer"].notes:
        print(f"note: {note}", file=sys.stderr)
    options["template"] = template or own
    compute = ComputeConfig(dtype=dtype or "auto")
    whole = compute_dtype(compute.dtype) == "float32"  # cast once; lower precisions keep the router as it is on disk
    model = read_model(checkpoint, dtype="float32" if whole else None, compute=compute)
    answers_file = prompts is None and before and before[-1]["role"] in ("user", "tool")
    if prompts is None and chat and sys.stdin.isatty() and not answers_file:
        _converse(model, before, options)
        return 0
    texts = list(prompts or ([""] if answers_file else [sys.stdin.read().rstrip("\n")]))
    asked: list[Any] = [[*before, {"role": "user", "content": each}] if chat else each for each in texts]
    if answers_file:
        asked = [before]
    if len(texts) == 1:
        print("" if chat else texts[0], end="", flush=True)
        _write(text.stream(model, asked[0], **options))
        return 0
    answers = text.generate(model, asked, **options)
    for number, (prompt, answer) in enumerate(zip(texts, answers, strict=True), 1):
        joint = "\n" if chat else ""
        print(f"--- {number} ---\n{prompt}{joint}{answer}")
    return 0


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
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise UserError(f"--turns {file} is no JSON ({error})") from None
    found = found.get("messages", [found]) if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) and "role" in m for m in found):
        raise UserError(f'--turns {file} must hold messages, such as [{{"role": "user", "content": "Hello"}}]')
    return found


def _converse(model: Any, before: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Turns typed by hand, until the end of input."""
    messages = list(before)
    with contextlib.suppress(EOFError):
        while True:
            messages.append({"role": "user", "content": input("> ")})
            answer = _write(text.stream(model, messages, **options))
            if not answer.strip():  # an empty answer cannot stand in a conversation
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def _write(pieces: Iterator[str]) -> str:
    written = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        written += piece
    print(flush=True)
    return written
