"""`eval --passkey`, `eval --by-length`: what a checkpoint makes of long contexts, printed, and kept beside the run."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.prepare import digest, write_atomically
from mixtral_jax.data.progress import meter, say
from mixtral_jax.data.records import source_files, text_size_estimate
from mixtral_jax.data.text import Tokenizer, texts_of
from mixtral_jax.train.base import newest_step
from mixtral_jax.train.commands.benchmark import model_of
from mixtral_jax.train.config import MachineConfig, RunConfig, load_config, shape_of
from mixtral_jax.train.errors import ExitCode, UserError
from mixtral_jax.train.evals import (
    Document,
    by_length_tables,
    long_documents,
    loss_by_length,
    passkey_accuracy,
    passkey_table,
)
from mixtral_jax.train.meetings import agree
from mixtral_jax.train.read_model import read_tokenizer, results_directory
from mixtral_jax.train.run import failures_reported

SHORTEST = 128  # of the lengths that are tried where none are named; each is twice the one before


@dataclass(frozen=True)
class LongContext:
    """What is asked of a checkpoint, as the command line says it."""

    passkey: bool = False
    by_length: str | None = None  # documents: a file, a directory, or the run file whose validation sources they are
    lengths: Sequence[int] | None = None
    depths: Sequence[float] | None = None
    samples: int | None = None
    seed: int | None = None


def long_context(
    checkpoint: str, config: RunConfig | MachineConfig, asked: LongContext, *, out: str | None, as_json: bool
) -> int:
    """Print what is found, and write passkey.json and by_length.json into <run>/eval/<step>, or `out`.

    Raises:
        UserError: lengths, depths or samples that make no sense, documents that are too short, or as `model_of`.
    """
    _check(asked)
    with failures_reported(None):
        tokenizer, place = read_tokenizer(checkpoint), newest_step(checkpoint)
        sources = _sources(asked.by_length) if asked.by_length else []
        directory = results_directory(checkpoint, place, out)
        agree(asked=digest([repr(asked)]), checkpoint=Path(place).name)
        most, samples = shape_of(place).max_position_embeddings, asked.samples or 20
        lengths = sorted(set(asked.lengths or _doubling(most)))
        if lengths[-1] > most and jax.process_index() == 0:
            say(f"note: the model was made for {most} tokens, its max_position_embeddings")
        documents, known = _documents(sources, tokenizer, lengths, samples) if sources else ([], [])
        found: dict[str, Any] = {}
        with model_of(checkpoint, place, config, tokenizer) as model:
            if asked.passkey:
                depths, seed = sorted(set(asked.depths or (0.0, 0.25, 0.5, 0.75, 1.0))), asked.seed or 0
                with _meter("passkeys", sum(lengths) * len(depths) * samples) as advance:
                    found["passkey"] = passkey_accuracy(
                        model, tokenizer, lengths=lengths, depths=depths, samples=samples, seed=seed, advance=advance
                    )
            if sources:
                with _meter("documents", sum(known) * len(documents)) as advance:
                    result = loss_by_length(model, tokenizer, documents, known, advance=advance)
                    found["by_length"] = {"data": asked.by_length, **result}
    if jax.process_index() > 0:
        return ExitCode.DONE
    _show(checkpoint, found, as_json)
    if directory is not None:
        for name, result in found.items():
            write_atomically(directory / f"{name}.json", json.dumps({"checkpoint": checkpoint, **result}))
            say(f"written: {directory / name}.json")
    return ExitCode.DONE


def _check(asked: LongContext) -> None:
    for length in asked.lengths or ():
        if length < 2:
            raise UserError(f"--lengths has {length}: a text has at least 2 tokens")
    if not asked.passkey and (asked.depths, asked.seed) != (None, None):
        raise UserError("--depths and --seed are for --passkey, which is not there")
    for depth in asked.depths or ():
        if not 0 <= depth <= 1:
            raise UserError(f"--depths has {depth}: they are from 0 to 1")
    if asked.samples is not None and asked.samples < 1:
        raise UserError(f"--samples is {asked.samples}: it is at least 1")


def _sources(path: str) -> list[SourceConfig]:
    """Where documents are, by the name of a run file or of what holds them.

    Raises:
        ValueError: nothing is there.
    """
    is_run_file = path.endswith((".yaml", ".yml"))
    sources = load_config(path).config.data.validation if is_run_file else [SourceConfig(name="documents", path=path)]
    if not sources:
        raise UserError(f"data.validation of {path} is empty: there are no documents")
    for source in sources:
        source_files(source)
    return list(sources)


def _documents(
    sources: Sequence[SourceConfig], tokenizer: Tokenizer, lengths: Sequence[int], samples: int
) -> tuple[list[Document], list[int]]:
    """Those that are long enough, the same for all processes, and the lengths that they have."""
    texts = (text for source in sources for text in texts_of(source))
    with _meter("reading", sum(text_size_estimate(source_files(source)) for source in sources)) as advance:
        documents, known = long_documents(texts, tokenizer, lengths, samples, advance)
    agree(documents=digest([document.ids for document in documents]))
    if len(documents) < samples and jax.process_index() == 0:
        say(f"note: {len(documents)} documents, not {samples}, have {known[-1]} tokens")
    return documents, known


def _doubling(most: int) -> list[int]:
    """128, 256, ... and the last."""
    return [*takewhile(lambda length: length < most, (SHORTEST << power for power in count())), most]


@contextmanager
def _meter(title: str, total: int) -> Iterator[Callable[[int], None]]:
    with meter(title, total, show=jax.process_index() == 0) as advance:
        yield lambda tokens: advance(tokens, "")


def _show(checkpoint: str, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"checkpoint": checkpoint, **found}))
        return
    console = Console(highlight=False)
    if "passkey" in found:
        console.print(passkey_table(found["passkey"]))
    if "by_length" in found:
        console.print(*by_length_tables(found["by_length"]), sep="\n")
