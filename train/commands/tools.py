"""Commands that train nothing: compare checkpoints, prepare and look at data, train a tokenizer."""

import json
import re
from collections.abc import Sequence

from rich.console import Console

from mixtral_jax import convert
from mixtral_jax.data import preview as previewing
from mixtral_jax.data import train_tokenizer as tokenizing
from mixtral_jax.data.prepare import prepare as prepare_data
from mixtral_jax.train.config import RunConfig, json_schema
from mixtral_jax.train.errors import ExitCode, UserError


def verify(a: str, b: str, *, prompts: str | None = None, as_json: bool = False) -> int:
    """Compare two checkpoints; 0 where they are the same, 4 where not."""
    report = convert.verify(a, b, prompts=prompts)
    print(json.dumps(report.to_json()) if as_json else "\n".join(report.lines()))
    return ExitCode.DONE if report.identical else ExitCode.DIFFERENT


def prepare(config: RunConfig, *, part: str | None = None) -> int:
    """Tokenise and pack all that a run reads, or one part of it.

    Raises:
        UserError: `part` is not I/N; see also data.prepare.
    """
    prepared = prepare_data(config.data, config.seq_len, config.seed, part=parse_part(part))
    if not prepared.missing_parts:
        print(*[prepared.summary(), *prepared.readings()], sep="\n")
    else:
        print(f"still to be made by other machines: {', '.join(prepared.missing_parts)}")
    return 0


def parse_part(text: str | None) -> tuple[int, int] | None:
    """`2/8` -> (2, 8).

    Raises:
        UserError: it is something else, or out of range.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part {text!r} must be I/N with I from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def preview(config: RunConfig, *, rows: int = 3) -> int:
    """Show rows as the model will read them, and the arithmetic of the mixture."""
    console = Console(highlight=False, soft_wrap=True)
    shown = previewing.preview(
        config.data, seq_len=config.seq_len, seed=config.seed, steps=config.steps,
        global_batch_size=config.global_batch_size, rows=rows,
    )  # fmt: skip
    for text in shown:
        console.print(text)
    return 0


def train_tokenizer(
    files: Sequence[str], *, output: str, vocab_size: int, text_key: str = "text", force: bool = False
) -> int:
    """Train a SentencePiece model and say what came out."""
    tokenizer = tokenizing.train_tokenizer(files, vocab_size, output, text_key=text_key, force=force)
    print(f"{output}: {tokenizer.vocab_size} pieces")
    return 0


def schema(stage: str) -> int:
    """Print the JSON Schema of a stage's file."""
    print(json.dumps(json_schema(stage), indent=2))
    return 0
