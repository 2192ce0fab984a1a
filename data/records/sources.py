"""Files of records, read as lumps."""

import codecs
import contextlib
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import columnar
from mixtral_jax.data.records.files import (
    cannot_read,
    file_size,
    files_below,
    is_directory,
    is_remote,
    join,
    open_file,
    own_name,
)
from mixtral_jax.data.records.lump import LUMP_BYTES, Census, Lump, Place, Unit, kind_of

_READ_BYTES = 1 << 18
_ZSTD_WINDOW = 1 << 31  # of `zstd --ultra --long=31`; a file takes the memory that it asks for
_RECORD_CHARS = 256 << 20  # of a record in a JSON array, which is held until its end is found
UNIT_BYTES = 8 << 20  # see units.py
TEXT_PIECE_BYTES = 8 << 20

_EXTENSIONS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".arrow": "datasets",
}
SETS = ("tfds", "datasets")  # formats of directories that are one data set
# how a JSON array of objects begins, with null or the like before the first, perhaps
_ARRAY = re.compile(rb"""(?:\xef\xbb\xbf)?\s*\[\s*((null|true|false|[-+.\deE]+|"([^"\\]|\\.)*")\s*,\s*)*[{\]]""")
_SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8
_NO_END = "the JSON array has no end (an incomplete download?), or something follows it,"
_MAGIC = {
    "gzip": rb"\x1f\x8b",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "bzip2": rb"BZh\d1AY&SY",
    "xz": rb"\xfd7zXZ\0",
    "a zip archive": rb"PK\x03\x04",
    "Parquet": rb"PAR1[\0-\x1f]",
    "Arrow": rb"ARROW1\0\0|\xff{4}.{3}\0\x10\0\0\0",
}
_RATIO = {".gz": 4, ".zst": 4, ".parquet": 3}


def compression(path: str) -> str:
    """`.gz` or `.zst` where a name ends so, in letters of any size; else nothing."""
    ending = os.path.splitext(own_name(path))[1].lower()
    return ending if ending in (".gz", ".zst") else ""


def format_by_name(path: str) -> str | None:
    """What a file holds, by its extension; None: that says nothing."""
    name = own_name(path)
    extension = os.path.splitext(name[: -len(compression(path)) or None])[1]
    # ArrayRecord shards are usually named NAME.array_record-00000-of-00001
    return _EXTENSIONS.get(extension.split("-")[0].lower())


def file_format(source: SourceConfig, path: str) -> str:
    """The format of one file or directory.

    Raises:
        ValueError: `auto` and the name says nothing.
    """
    if source.format != "auto":
        return source.format
    if _is_set(path):
        names = set(files_below(path)) if is_remote(path) else set(os.listdir(path))
        if names & {"dataset_dict.json", "state.json"}:
            return "datasets"
        return "tfds" if {"dataset_info.json", "features.json"} <= names else "directory"
    known = format_by_name(path)
    if known is None:
        raise ValueError(f"the name of {path} does not say its format: set format")
    return known


def text_size_estimate(files: Iterable[str]) -> int:
    """Bytes of text, roughly: from file sizes and usual compression ratios."""
    total = 0
    for file in files:
        ratio = _RATIO.get(os.path.splitext(own_name(file))[1].lower(), 1)
        total += ratio * sum(file_size(part) for part in data_files(file))
    return total


def data_files(path: str) -> list[str]:
    """The file itself, or every file under a data set directory, sorted."""
    if not _is_set(path):
        return [path]
    if is_remote(path):
        return [join(path, name) for name in files_below(path)]
    return sorted(str(p) for p in Path(path).rglob("*") if not p.is_dir())


def _is_set(path: str) -> bool:
    """Whether it is a directory; elsewhere, where each look takes a while, not if its name is that of a file."""
    return os.path.isdir(path) if not is_remote(path) else format_by_name(path) is None and is_directory(path)


def read_lumps(
    source: SourceConfig, file: str, columns: tuple[str, ...], census: Census, unit: Unit | None = None
) -> Generator[Lump, None, None]:
    """All records of one file, or of a unit of it.

    `columns` are those that columnar files need to read; of alternatives those that the file has; of none all.

    Raises:
        ValueError: a file that is not what its name says, is cut off, or lacks the columns (unless skipped).
    """
    unit, kind = unit or Unit(file), file_format(source, file)
    if kind == "jsonl":
        yield from _jsonl(unit, census)
        return
    readers = {
        "text": _text,
        "parquet": columnar.parquet,
        "array_record": columnar.array_record,
        "tfds": columnar.tfds,
        "datasets": columnar.hugging_face,
    }
    before = {"parquet": unit.first, "text": unit.start // TEXT_PIECE_BYTES}.get(kind, unit.start)
    yield from columnar.lumps(file, readers[kind](source, unit, columns, census), LUMP_BYTES, before)


def with_text_column(source: SourceConfig, names: Sequence[str]) -> SourceConfig:
    """The source with the column that holds its texts: where that is not set, and there is no `text`, the only one of
    strings in the first records that there are. Beside lists or objects, as a chat has them, it may be its id.
    """
    if source.text_key != "text":
        return source
    lumps = (lump for name in names for lump in read_lumps(source, name, (), Census(skip=True)))
    first = next(filter(None, ([record for _, record in lump.parse(Census(skip=True))] for lump in lumps)), [])
    kinds = {type(value) for record in first for value in record.values()}
    strings = {key for record in first for key, value in record.items() if isinstance(value, str)}
    is_one = len(strings) == 1 and not {list, dict} & kinds
    return source.model_copy(update={"text_key": strings.pop()}) if is_one else source


class _CutOff(Exception):
    """The bytes of a file end, or make no sense, before its end."""


def is_array(file: str) -> bool:
    """Whether a file of JSON is one array, and not lines."""
    with contextlib.suppress(_CutOff):
        return _ARRAY.match(next(_blocks(file), b"")) is not None
    return False


def _jsonl(unit: Unit, census: Census) -> Iterator[Lump]:
    """Whole lines, about a megabyte of them at a time; of a file that is cut off, those that are whole."""
    number, offset = 1, 0
    blocks = _blocks(unit.file, unit.start)
    try:
        first = next(blocks, b"")
        blocks = itertools.chain([first], blocks)
        if not unit.start and _ARRAY.match(first):
            yield from columnar.lumps(unit.file, _array(unit.file, blocks, census), LUMP_BYTES)
            return
        for at, lines in _lines(blocks, unit, LUMP_BYTES):
            offset = at if number == 1 else offset
            yield Lump(unit.file, number, lines, offset=offset)
            number += lines.count(b"\n")
    except _CutOff as error:
        census.report(unit.file, f"{error} after line {number - 1}")


def _lines(blocks: Iterator[bytes], unit: Unit, size: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines, together those that begin in the same `size` bytes of the file, and where the first begins.

    A unit has the lines that begin in it. Raises _CutOff behind the last whole line of a file that is damaged.
    """
    held: list[bytes] = []
    at = end = max(0, unit.start - 1)  # of what is held
    stop = math.inf if unit.stop is None else unit.stop
    limit = unit.start or min(size, stop)  # the next line that begins here or behind is of the next lump
    cut: _CutOff | None = None
    while at < stop:
        try:
            block = next(blocks, b"")
        except _CutOff as error:
            block, cut = b"", error
        if not block:
            break
        start, end = end, end + len(block)
        while end >= limit and (after := block.find(b"\n", max(0, int(limit) - 1 - start)) + 1):
            lines = b"".join([*held, block[:after]])
            if at >= unit.start:
                yield at, lines
            at = start = start + after
            held, block, limit = [], block[after:], min((at // size + 1) * size, stop)
            if at >= stop:
                return
        if at < unit.start and end >= stop:
            return  # all within one long line
        held.append(block)
    rest = b"".join(held)
    rest = rest[: rest.rfind(b"\n") + 1] if cut else rest
    if rest and at >= unit.start:
        yield at, rest
    if cut:
        raise cut


def _array(file: str, blocks: Iterator[bytes], census: Census) -> columnar.Records:
    """The objects of a JSON array, read piece by piece; of one that is cut off or malformed, those before that."""
    utf8, decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape"), json.JSONDecoder()
    gap = re.compile(r"\s*(.?)\s*(.?)", re.DOTALL)  # a bracket or a comma, and what follows it
    text, at, number, enough = "", 0, 0, 0
    fault, is_last, is_over = "", False, False
    while not (fault or is_last):
        cut = ""
        try:
            block = next(blocks, b"")
        except _CutOff as error:
            block, cut = b"", str(error)
        is_last = not block
        if at:
            text, at = text[at:], 0
        text += utf8.decode(block, is_last)
        if not number:
            text = text.removeprefix("\ufeff")
        if len(text) > _RECORD_CHARS:
            fault = f"a record of more than {_RECORD_CHARS >> 20} MB (a string without its end? write it as JSON lines)"
        elif len(text) < enough and not is_last:
            continue
        while not fault and (found := gap.match(text, at)) and (mark := found[1]):
            if is_over or mark not in (",]" if number else "["):
                fault = _NO_END if is_over else "malformed JSON (no comma)"
            elif mark == "]" or (mark == "[" and found[2] == "]"):
                at, is_over = found.end(1 if mark == "]" else 2), True
            elif not found[2]:
                break
            else:
                try:
                    record, end = decoder.raw_decode(text, found.start(2))
                except (ValueError, RecursionError) as error:
                    what = getattr(error, "msg", str(error))
                    left = 0 if what.startswith("Unterminated") else len(text.rstrip()) - getattr(error, "pos", 0)
                    if left > (0 if is_last else 16):  # else the object goes on in the next block
                        fault = f"malformed JSON ({what})"
                    enough = 2 * (len(text) - at)  # so that a large one is not begun anew with every block
                    break
                if end == len(text) and not is_last:
                    break  # of a number, perhaps
                number += 1
                is_utf8 = _SURROGATE.search(text, at, end) is None
                at = end
                if is_utf8 and isinstance(record, dict):
                    yield record
                    continue
                what = f"expected a JSON object, found {kind_of(record)}" if is_utf8 else "not UTF-8"
                census.report(Place(file, number), what)
                yield None
        if is_last:
            fault = cut or fault or ("" if is_over else _NO_END)
    if fault:
        census.report(file, f"{fault} after record {number}; nothing behind it is read")


def _text(source: SourceConfig, unit: Unit, columns: tuple[str, ...], census: Census) -> columnar.Records:
    """A file is one document; one of more than 8 MB is cut at line ends."""
    number = unit.start // TEXT_PIECE_BYTES  # of the part before
    try:
        for at, piece in _lines(_blocks(unit.file, unit.start), unit, TEXT_PIECE_BYTES):
            yield from [None] * (at // TEXT_PIECE_BYTES - number)  # within a long line none begins
            number = at // TEXT_PIECE_BYTES + 1
            try:
                yield {source.text_key: (piece if at else piece.removeprefix(codecs.BOM_UTF8)).decode("utf-8")}
            except UnicodeDecodeError as error:
                census.report(Place(unit.file, number, "part"), f"not UTF-8 (byte {error.start + 1})")
                yield None
    except _CutOff as error:
        census.report(Place(unit.file, max(1, number), "part"), error)


def _blocks(file: str, start: int = 0) -> Iterator[bytes]:
    """The bytes of a text, decompressed; of a unit with the one in front of it, which may end a line.

    Raises _CutOff where they end early.

    Raises:
        ValueError: it is UTF-16, by its mark or by its first two characters, or no text but one of _MAGIC.
    """
    blocks, head = _bytes(file, start), b""
    if start:
        yield from blocks
        return
    for block in blocks:
        head += block
        if len(head) >= 64:
            break
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head[1:4:2] == b"\0\0" or head[:3:2] == b"\0\0":
        raise ValueError(f"{file} is UTF-16 text: make it UTF-8, with iconv -f UTF-16 -t UTF-8 for one")
    for kind, beginning in _MAGIC.items():
        if re.match(beginning, head, re.DOTALL):
            raise ValueError(f"{file} is no text: it holds {kind}; give it the name that says so")
    yield head
    yield from blocks


def _bytes(file: str, start: int) -> Iterator[bytes]:
    try:
        with open_file(file) as stream:
            if start:
                stream.seek(start - 1)
            raw = iter(lambda: stream.read(_READ_BYTES), b"")
            if compression(file) == ".gz":
                yield from _inflate(raw, lambda: zlib.decompressobj(31), zlib.error)
            elif compression(file) == ".zst":
                import zstandard

                reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
                yield from _inflate(raw, reader.decompressobj, zstandard.ZstdError)
            else:
                yield from raw
    except OSError as error:
        raise cannot_read(file, error) from None


def _inflate(raw: Iterator[bytes], new_stream: Any, failure: type[Exception]) -> Iterator[bytes]:
    """Streams one after another, as `cat a.gz b.gz` makes them; zero bytes after the last are padding."""
    inflate = None
    for block in raw:
        while block := block if inflate else block.lstrip(b"\0"):
            inflate = inflate or new_stream()
            try:
                data = inflate.decompress(block)
            except failure as error:
                raise _CutOff(f"damaged, or not compressed as its name says ({error}),") from None
            if data:
                yield data
            block, inflate = inflate.unused_data, None if inflate.eof else inflate
    if inflate is not None:
        raise _CutOff("the compressed file is cut off (an incomplete download?)")
