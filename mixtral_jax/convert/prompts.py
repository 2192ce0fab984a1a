"""Token ids to compare models on: a fixed set, or the lines of a file."""

import json
import os
from pathlib import Path

import numpy as np

from mixtral_jax.convert.files import Directory

_ROWS, _LENGTH = 4, 64


def read_prompts(
    prompts: str | os.PathLike[str] | list[list[int]] | None, vocab_size: int, tokenizer: Directory | None
) -> list[list[int]]:
    """Rows of token ids.

    Args:
        prompts: a file with one prompt a line (text, or a JSON list of ids); lists of ids; None: a fixed pseudo-random
            set.
        tokenizer: the directory whose tokenizer turns text into ids.

    Raises:
        ValueError: an empty file, an id outside the vocabulary, or text and no tokenizer.
    """
    if prompts is None:
        return np.random.default_rng(0).integers(0, vocab_size, (_ROWS, _LENGTH)).tolist()
    if isinstance(prompts, list):
        rows = prompts
    else:
        lines = [line for line in Path(prompts).read_text().splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines if line.lstrip().startswith("[")]
        if len(rows) != len(lines):
            rows = _encode(lines, tokenizer)
    if not rows or not all(rows):
        raise ValueError("no prompts: at least one non-empty line is needed")
    worst = max(max(row) for row in rows)
    if worst >= vocab_size or min(min(row) for row in rows) < 0:
        raise ValueError(f"a prompt holds token id {worst}, the vocabulary has {vocab_size}")
    return rows


def _encode(lines: list[str], directory: Directory | None) -> list[list[int]]:
    names = directory.names() if directory is not None else []
    if directory is not None and "tokenizer.json" in names:
        from tokenizers import Tokenizer

        text = Tokenizer.from_str(directory.read_bytes("tokenizer.json").decode())
        return [text.encode(line).ids for line in lines]
    if directory is not None and "tokenizer.model" in names:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_proto=directory.read_bytes("tokenizer.model"))
        return [[pieces.bos_id(), *pieces.encode(line)] for line in lines]
    raise ValueError("the prompts are text, and the checkpoint has neither tokenizer.json nor tokenizer.model")
