"""Files of records, read as lumps."""

import codecs
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import columnar
from mixtral_jax.data.records.files import file_size, open_file, own_name
from mixtral_jax.data.records.lump import LUMP_BYTES, Census, Lump, kind_of

_READ_BYTES = 1 << 18
_ZSTD_WINDOW = 1 << 31  # of `zstd --ultra --long=31`; a file takes the memory that it asks for
_TEXT_PIECE_BYTES = 8 << 20

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
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*[{\]]")  # how a JSON array of objects begins
_RATIO = {".gz": 4, ".zst": 4, ".parquet": 3}


def format_by_name(path: str) -> str | None:
    """What a file holds, by its extension; None: that says nothing."""
    stem, extension = os.path.splitext(own_name(path))
    if extension in (".gz", ".zst"):
        extension = os.path.splitext(stem)[1]
    # ArrayRecord shards are usually named NAME.array_record-00000-of-00001
    extension = extension.split("-")[0]
    return _EXTENSIONS.get(extension.lower())


def file_format(source: SourceConfig, path: str) -> str:
    """The format of one file or directory.

    Raises:
        ValueError: `auto` and the name says nothing.
    """
    if source.format != "auto":
        return source.format
    if os.path.isdir(path):
        names = set(os.listdir(path))
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
        ratio = _RATIO.get(os.path.splitext(file)[1], 1)
        total += ratio * sum(file_size(part) for part in data_files(file))
    return total


def data_files(path: str) -> list[str]:
    """The file itself, or every file under a data set directory, sorted."""
    if not os.path.isdir(path):
        return [path]
    return sorted(str(p) for p in Path(path).rglob("*") if not p.is_dir())


def read_lumps(source: SourceConfig, file: str, columns: tuple[str, ...], census: Census) -> Iterator[Lump]:
    """All records of one file.

    `columns` are those that columnar files need to read; of alternatives those that the file has; of none all.

    Raises:
        ValueError: a file that is not what its name says, is cut off, or lacks the columns (unless skipped).
    """
    kind = file_format(source, file)
    if kind == "jsonl":
        yield from _jsonl(file, census)
        return
    readers = {
        "text": _text,
        "parquet": columnar.parquet,
        "array_record": columnar.array_record,
        "tfds": columnar.tfds,
        "datasets": columnar.hugging_face,
    }
    yield from columnar.lumps(file, readers[kind](source, file, columns, census), LUMP_BYTES)


def with_text_column(source: SourceConfig, names: Sequence[str]) -> SourceConfig:
    """The source with the column that holds its texts: where that is not set, and there is no `text`, the only one of
    strings in the first records of its first file.
    """
    if source.text_key != "text" or not names:
        return source
    lump = next(read_lumps(source, names[0], (), Census(skip=True)), Lump(names[0], 1))
    strings = {key for _, record in lump.parse(Census(skip=True)) for key in record if isinstance(record[key], str)}
    return source.model_copy(update={"text_key": strings.pop()}) if len(strings) == 1 else source


class _CutOff(Exception):
    """The bytes of a file end, or make no sense, before its end."""


def _jsonl(file: str, census: Census) -> Iterator[Lump]:
    """Whole lines, about a megabyte of them at a time; of a file that is cut off, those that are whole."""
    rest: list[bytes] = []
    held, number = 0, 1
    damage = ""
    try:
        for block in _blocks(file):
            if number == 1 and not held and _ARRAY.match(block):
                yield from columnar.lumps(file, _array(file, census), LUMP_BYTES)
                return
            end = block.rfind(b"\n") + 1
            if end and held + end >= LUMP_BYTES:
                lines = b"".join([*rest, block[:end]])
                yield Lump(file, number, lines)
                number += lines.count(b"\n")
                rest, held = [], 0
                block = block[end:]
            rest.append(block)
            held += len(block)
    except _CutOff as error:
        damage = str(error)
    lines = b"".join(rest)
    if damage:
        lines = lines[: lines.rfind(b"\n") + 1]
        last = number - 1 + lines.count(b"\n")
        census.report(f"{file}: {damage} after line {last}")
    if lines:
        yield Lump(file, number, lines)


def _array(file: str, census: Census) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array, read piece by piece; of one that is cut off or malformed, those before that."""
    utf8, decoder, mark = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder(), re.compile(r"\s*[\[,]\s*")
    text, at, number, fault = "", 0, 0, ""
    try:
        for block in itertools.chain(_blocks(file), [b""]):
            text, at, last = text[at:] + utf8.decode(block, not block), 0, not block
            while rest := text[at:].lstrip()[:1]:
                found = mark.match(text, at)
                if rest == "]" or (found and number == 0 and text.startswith("]", found.end())):
                    break
                if found is None or (rest == "[") != (number == 0):
                    fault = "malformed JSON (no comma)"
                    break
                try:
                    record, at = decoder.raw_decode(text, found.end())
                except json.JSONDecodeError as error:
                    left = 0 if error.msg.startswith("Unterminated") else len(text.rstrip()) - error.pos
                    if left > (0 if last else 16):  # else the object goes on in the next block
                        fault = f"malformed JSON ({error.msg})"
                    break
                number += 1
                if isinstance(record, dict):
                    yield record
                else:
                    census.report(f"{file}, record {number}: expected a JSON object, found {kind_of(record)}")
            if fault:
                break
        else:
            if not re.fullmatch(r"\s*(\[\s*)?\]\s*", text[at:]):
                fault = "the JSON array has no end (an incomplete download?), or something follows it,"
    except _CutOff as error:
        fault = str(error)
    except (UnicodeDecodeError, RecursionError) as error:
        fault = str(error)
    if fault:
        census.report(f"{file}: {fault} after record {number}; nothing behind it is read")


def _text(source: SourceConfig, file: str, columns: tuple[str, ...], census: Census) -> Iterator[dict[str, str]]:
    """A file is one document; one of more than 8 MB is cut at line ends."""
    for number, piece in enumerate(_pieces(file, census), 1):
        try:
            yield {source.text_key: piece.decode("utf-8")}
        except UnicodeDecodeError as error:
            census.report(f"{file}, part {number}: not UTF-8 (byte {error.start + 1})")


def _pieces(file: str, census: Census) -> Iterator[bytes]:
    rest, number = b"", 1
    try:
        for block in _blocks(file):
            rest += block
            if len(rest) >= _TEXT_PIECE_BYTES and (end := rest.rfind(b"\n") + 1):
                yield rest[:end]
                rest, number = rest[end:], number + 1
    except _CutOff as error:
        rest = rest[: rest.rfind(b"\n") + 1]
        census.report(f"{file}, part {number}: {error}")
    if rest:
        yield rest


def _blocks(file: str) -> Iterator[bytes]:
    """The bytes of a text, decompressed and without a byte order mark; raises _CutOff where they end early.

    Raises:
        ValueError: it is UTF-16, by its mark or by its first two characters.
    """
    blocks, head = _bytes(file), b""
    for block in blocks:
        head += block
        if len(head) >= 64:
            break
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head[1:4:2] == b"\0\0" or head[:3:2] == b"\0\0":
        raise ValueError(f"{file} is UTF-16 text: make it UTF-8, with iconv -f UTF-16 -t UTF-8 for one")
    yield head.removeprefix(codecs.BOM_UTF8)
    yield from blocks


def _bytes(file: str) -> Iterator[bytes]:
    try:
        with open_file(file) as stream:
            raw = iter(lambda: stream.read(_READ_BYTES), b"")
            if own_name(file).endswith(".gz"):
                yield from _inflate(raw, lambda: zlib.decompressobj(31), zlib.error)
            elif own_name(file).endswith(".zst"):
                import zstandard

                reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
                yield from _inflate(raw, reader.decompressobj, zstandard.ZstdError)
            else:
                yield from raw
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _inflate(raw: Iterator[bytes], new_stream: Any, failure: type[Exception]) -> Iterator[bytes]:
    """Streams one after another, as `cat a.gz b.gz` makes them; zero bytes after the last are padding."""
    inflate = None
    for block in raw:
        while block:
            if inflate is None:
                block = block.lstrip(b"\0")
                if not block:
                    break
                inflate = new_stream()
            try:
                data = inflate.decompress(block)
            except failure as error:
                raise _CutOff(f"damaged, or not compressed as its name says ({error}),") from None
            yield data
            block = inflate.unused_data if inflate.eof else b""
            inflate = None if inflate.eof else inflate
    if inflate is not None:
        raise _CutOff("the compressed file is cut off (an incomplete download?)")
