"""Files as units of work, of a fixed size: rows depend neither on how many machines and processes read, nor on who."""

import errno
import itertools

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import columnar, sources
from mixtral_jax.data.records.files import file_size
from mixtral_jax.data.records.lump import Unit


def units_of(source: SourceConfig, file: str) -> list[Unit]:
    """A file or a directory that is one data set as units, in order.

    Bytes of text and of JSON lines, row groups of Parquet, records of ArrayRecord and TFDS, files of a data set that
    was saved. What is compressed, an array of JSON, or cannot be understood is one unit, whose reader says what is
    wrong: so that of several errors the first in the order of the files is the one that is reported.
    """
    kind, size = sources.file_format(source, file), sources.text_size_estimate([file])
    whole = [Unit(file, size=size)]
    if size <= sources.UNIT_BYTES:
        return whole
    try:
        if kind in ("jsonl", "text") and not sources.compression(file):
            return whole if kind == "jsonl" and sources.is_array(file) else _ranges(kind, file)
        if kind == "parquet":
            return _row_groups(file, size)
        if kind == "datasets":
            saved = columnar.arrow_files(file, source.split)
            return [Unit(part, size=file_size(part)) for part in saved] or whole
        if kind in ("array_record", "tfds"):
            count = columnar.count(source, kind, file)
            step = max(1, count * sources.UNIT_BYTES // size)
            starts = range(0, count, step)
            return [Unit(file, start, min(start + step, count), size=size // len(starts)) for start in starts] or whole
    except Exception as error:  # whatever a library raises of a damaged file
        if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:  # nobody knows what it holds
            raise
    return whole


def _ranges(kind: str, file: str) -> list[Unit]:
    step, size = sources.UNIT_BYTES, file_size(file)
    if kind == "text":  # of whole pieces
        step = max(1, step // sources.TEXT_PIECE_BYTES) * sources.TEXT_PIECE_BYTES
    return [Unit(file, start, start + step, size=min(step, size - start)) for start in range(0, size, step)]


def _row_groups(file: str, size: int) -> list[Unit]:
    """As many row groups as hold a unit's bytes, before their compression."""
    groups, found, start = columnar.row_groups(file), [], 0
    total, before = max(1, sum(own for _, own in groups)), [0, *itertools.accumulate(records for records, _ in groups)]
    held = 0
    for stop, (_, own) in enumerate(groups, 1):
        held += own
        if held >= sources.UNIT_BYTES or stop == len(groups):
            found.append(Unit(file, start, stop, before[start], size * held // total))
            start, held = stop, 0
    return found or [Unit(file, size=size)]
