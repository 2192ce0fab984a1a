"""The beginning of a source made into examples, without the cache: to see that it can be, and to look at a model by."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.records import Census, Lump, is_remote, read_lumps, source_files, with_text_column
from mixtral_jax.data.text import (
    Documents,
    Template,
    Tokenizer,
    columns,
    layouts_of,
    text_documents,
    tuning_documents,
)

_RECORDS, _FIRST_ROWS = 8, 100  # that are made into examples, and that show the layout of a file
_DOCUMENTS = 20  # of which none is the larger part


def check_first_records(
    config: DataConfig, source: SourceConfig, files: Sequence[str], text: Tokenizer | Template
) -> None:
    """Whether the first file that is on this machine and has records begins with those that the run reads.

    Args:
        text: the template where the examples have one.

    Raises:
        ValueError: a file is not what its name says, or one of the records is not; or there is none.
    """
    if any(map(is_remote, files)):
        return  # a look would take longer
    census = Census(skip=config.on_error == "skip")
    named = _named(config, source, files)
    lumps = (
        (file, lump) for file in files for lump in read_lumps(named, file, columns(named, config.examples), census)
    )
    file, lump = next(lumps, ("", None))
    if lump is None:
        raise ValueError(f"{nothing_in(source, files)}, which has no records")
    lines = b"\n".join(lump.lines.split(b"\n", _RECORDS)[:_RECORDS])
    head = dataclasses.replace(lump, lines=lines, records=lump.records[:_RECORDS])
    documents_of(config, named, text, head, census, layouts_in(config, source, file, lump))


def first_documents(
    config: DataConfig, source: SourceConfig, text: Tokenizer | Template, tokens: int
) -> list[np.ndarray]:
    """Documents (n,) from the beginning of a source, together of `tokens` ids, or all that there is.

    Of one document a twentieth of the tokens are taken, and more only where there are not enough others.

    Args:
        text: the template where the examples have one.

    Raises:
        ValueError: a file is not what its name says, or a record is not; or there is no document.
    """
    most, enough, found = max(1, tokens // _DOCUMENTS), tokens, list[np.ndarray]()
    for ids in _all_documents(config, source, text):
        found.append(ids[:tokens])
        enough -= min(len(ids), most)
        if enough <= 0:
            break
    if not found:
        raise ValueError(nothing_in(source, source_files(source)))
    while most < tokens and sum(min(len(ids), most) for ids in found) < tokens:
        most *= 2
    before = itertools.accumulate((min(len(ids), most) for ids in found), initial=0)
    return [ids[: min(most, tokens - n)] for ids, n in zip(found, before, strict=False) if n < tokens]


def _all_documents(config: DataConfig, source: SourceConfig, text: Tokenizer | Template) -> Iterator[np.ndarray]:
    files, census = source_files(source), Census(skip=config.on_error == "skip")
    named = _named(config, source, files)
    for file in files:
        layouts = None
        for lump in read_lumps(named, file, columns(named, config.examples), census):
            layouts = layouts_in(config, source, file, lump) if layouts is None else layouts
            made = documents_of(config, named, text, lump, census, layouts)
            yield from filter(len, np.split(made.tokens, np.cumsum(made.lengths)[:-1]))


def _named(config: DataConfig, source: SourceConfig, files: Sequence[str]) -> SourceConfig:
    return with_text_column(source, files) if config.examples == "text" else source


def layouts_in(config: DataConfig, source: SourceConfig, file: str, lump: Lump) -> tuple[str, ...]:
    """The layouts of the first rows of a file, of which `lump` is the first; of texts none.

    Raises:
        ValueError: no row has a column that the source names.
    """
    if config.examples == "text":
        return ()
    rows = (record for _, record in itertools.islice(lump.parse(Census(skip=True)), _FIRST_ROWS))
    try:
        return layouts_of(rows, source, config.examples)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def documents_of(
    config: DataConfig, source: SourceConfig, text: Tokenizer | Template, lump: Lump, census: Census,
    layouts: tuple[str, ...],
) -> Documents:  # fmt: skip
    """The documents of a lump: texts as they are, chats and preferences by their template."""
    if not isinstance(text, Template):
        return text_documents(lump, source.text_key, text, census)
    return tuning_documents(lump, source, config.examples, text, config.train_on, census, layouts)


def nothing_in(source: SourceConfig, files: Sequence[str]) -> str:
    """What to say of a source of which nothing can be learned."""
    shown = ", ".join(files[:3]) + " ..." * (len(files) > 3)
    return f"source {source.name!r}: no documents to learn from in {shown}"
