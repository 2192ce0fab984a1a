"""`generate`: text from prompts, or answers in a chat."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mixtral_jax.config import ComputeConfig
from mixtral_jax.model import compute_dtype
from mixtral_jax.train import text
from mixtral_jax.train.read_model import read_model, read_tokenizer, run_config


def generate(
    checkpoint: str,
    *,
    prompts: Sequence[str] | None = None,
    chat: bool = False,
    template: str | None = None,
    tokenizer: str | None = None,
    dtype: Any = None,
    **options: Any,
) -> int:
    """Print continuations of prompts, or answers to them as a user's messages. One prompt appears as it is written.

    Args:
        checkpoint: an Orbax or Hugging Face directory, a run, or one of its steps.
        prompts: None: standard input is one prompt; typed by hand in a chat, each line is a turn.
        template: chat format; None: that of the run, else by the tokenizer's control tokens.
        tokenizer: None: that in the directory, else that of the run.
        options: max_new_tokens, temperature, top_k, top_p, seed.

    Raises:
        UserError: no tokenizer is found, or it does not fit the model.
    """
    run = run_config(checkpoint)
    options["tokenizer"] = read_tokenizer(tokenizer or checkpoint)
    options["template"] = template or (run.data.template if run is not None and run.stage != "pretrain" else None)
    compute = ComputeConfig(dtype=dtype or "auto")
    whole = compute_dtype(compute.dtype) == "float32"  # cast once; lower precisions keep the router as it is on disk
    model = read_model(checkpoint, dtype="float32" if whole else None, compute=compute)
    if prompts is None and chat and sys.stdin.isatty():
        _converse(model, options)
        return 0
    texts = [sys.stdin.read().rstrip("\n")] if prompts is None else list(prompts)
    asked: list[Any] = [[{"role": "user", "content": each}] if chat else each for each in texts]
    if len(texts) == 1:
        print("" if chat else texts[0], end="", flush=True)
        _write(text.stream(model, asked[0], **options))
        return 0
    answers = text.generate(model, asked, **options)
    for number, (prompt, answer) in enumerate(zip(texts, answers, strict=True), 1):
        joint = "\n" if chat else ""
        print(f"--- {number} ---\n{prompt}{joint}{answer}")
    return 0


def _converse(model: Any, options: dict[str, Any]) -> None:
    """Turns typed by hand, until the end of input."""
    messages: list[dict[str, str]] = []
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
