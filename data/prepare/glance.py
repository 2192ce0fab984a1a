"""The first records of a source made into examples and thrown away: what would end its preparation at once."""

import dataclasses
import itertools
from collections.abc import Sequence

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.records import Census, is_remote, read_lumps, with_text_column
from mixtral_jax.data.text import Template, Tokenizer, columns, layouts_of, text_documents, tuning_documents

_RECORDS, _FIRST_ROWS = 8, 100  # that are made into examples, and that show the layout of a file


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
    kind, census = config.examples, Census(skip=config.on_error == "skip")
    named = with_text_column(source, files) if kind == "text" else source
    lumps = ((file, lump) for file in files for lump in read_lumps(named, file, columns(named, kind), census))
    file, lump = next(lumps, ("", None))
    if lump is None:
        shown = ", ".join(files[:3]) + " ..." * (len(files) > 3)
        raise ValueError(f"source {source.name!r}: no documents to learn from in {shown}, which has no records")
    lines = b"\n".join(lump.lines.split(b"\n", _RECORDS)[:_RECORDS])
    head = dataclasses.replace(lump, lines=lines, records=lump.records[:_RECORDS])
    if not isinstance(text, Template):
        text_documents(head, named.text_key, text, census)
        return
    rows = (record for _, record in itertools.islice(lump.parse(Census(skip=True)), _FIRST_ROWS))
    try:
        layouts = layouts_of(rows, source, kind)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    tuning_documents(head, source, kind, text, config.train_on, census, layouts)
