"""Units of work: whoever reads them, and however small they are, they are the file read whole."""

import codecs
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import files, sources, units
from mixtral_jax.data.records.lump import Census, Unit, lines_before
from mixtral_jax.data.records.selection import source_files
from mixtral_jax.data.records.units import units_of

BAD = [file for above in Path(__file__).resolve().parents[2:] for file in above.glob("shared/data/bad/*.jsonl*")]
LINES = b"".join(json.dumps({"text": f"{i} " + "w\xe9" * (7 * i % 23)}).encode() + b"\n" for i in range(12))
LONG = json.dumps({"text": "long " * 60}).encode() + b"\n"
FILES = {
    "plain.jsonl": LINES,
    "no newline at the end.jsonl": LINES[:-1],
    "mark.jsonl": codecs.BOM_UTF8 + LINES,
    "mark alone.jsonl": codecs.BOM_UTF8 + b"\n" + LINES,
    "marks.jsonl": b"".join(codecs.BOM_UTF8 + line for line in LINES.splitlines(True)),
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n\n \n"),
    "newlines.jsonl": b"\n" * 50,
    "empty.jsonl": b"",
    "long line.jsonl": LINES + LONG + LINES,
    "long last line.jsonl": LINES + LONG[:-1],
    "one long line.jsonl": LONG,
    "bad lines.jsonl": LINES + b'{"text": \n' + LINES + b'{"text": "\xff"}\n[1]\n' + LINES + b"7\n" * 9,
    "cut.jsonl": LINES[:-9],
    "array.jsonl": json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1).encode(),
    "array with a mark.json": codecs.BOM_UTF8 + b"[" + LINES.replace(b"\n", b",\n")[:-2] + b"]",
    "bad array.jsonl": b"[" + LINES.replace(b"\n", b",\n"),
    "utf-16.jsonl": LINES.decode("latin-1").encode("utf-16"),
    "zipped.jsonl": gzip.compress(LINES),
    "a.jsonl.gz": gzip.compress(LINES + LONG),
    "cut.jsonl.gz": gzip.compress(LINES * 9)[:-300],
    "not.jsonl.gz": LINES,
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.txt": b"first line\nsecond\n" + LINES + LONG,
    "mark.txt": codecs.BOM_UTF8 + LINES,
    "bad.txt": LINES + b"\xff\n" + LINES,
    "a.txt.gz": gzip.compress(LINES),
    "cut.txt.gz": gzip.compress(np.random.default_rng(0).bytes(3000).hex().encode() + b"\n" + LINES)[:-40],
    "not.parquet": LINES,
    "not.array_record": LINES,
    "not.arrow": LINES,
}
BORDERS = [7, 40, 333, 5000]
Outcome = tuple[list[tuple[str, Any]], int, list[str]] | str


def outcome(source: SourceConfig, shares: list[Unit], skip: bool) -> Outcome:
    """The records with their places, and what was bad; or the error."""
    total, found = Census(skip), []
    try:
        for number, unit in enumerate(shares):
            census = Census(skip, number)
            for lump in sources.read_lumps(source, unit.file, ("text", "messages"), census, unit):
                found += [(lump.where(n), record) for n, record in lump.parse(census)]
            total.add(census)
    except ValueError as error:
        return str(error)
    return [(str(where), record) for where, record in found], total.bad, total.bad_examples


def whole(source: SourceConfig, skip: bool) -> Outcome:
    return outcome(source, [Unit(file) for file in source_files(source)], skip)


def shares_of(source: SourceConfig) -> list[Unit]:
    return [unit for file in source_files(source) for unit in units_of(source, file)]


def make_tiny(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", size)
    monkeypatch.setattr(sources, "LUMP_BYTES", max(1, size // 3))
    monkeypatch.setattr(sources, "_READ_BYTES", max(1, size // 2))
    monkeypatch.setattr(sources, "TEXT_PIECE_BYTES", 100)


@pytest.mark.parametrize("name", FILES)
def test_units_are_the_file_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    source = SourceConfig(name="s", path=str(tmp_path / name))
    monkeypatch.setattr(sources, "TEXT_PIECE_BYTES", 100)
    expected = [whole(source, skip) for skip in (True, False)]
    counts = []
    for size in BORDERS:
        make_tiny(monkeypatch, size)
        shares = shares_of(source)
        counts.append(len(shares))
        assert [outcome(source, shares, skip) for skip in (True, False)] == expected
        assert [whole(source, skip) for skip in (True, False)] == expected  # lumps of any size
    is_lines = name.endswith((".jsonl", ".txt")) and not {"array", "utf-16", "zipped", "empty"} & {*name[:-6].split()}
    assert counts[0] > 1 if is_lines else counts == [1] * len(BORDERS)


@pytest.mark.parametrize("name", ["plain.jsonl", "blank.jsonl", "bad lines.jsonl", "long line.jsonl"])
def test_whole_is_line_by_line(tmp_path: Path, name: str) -> None:
    """The slow twin: `split`."""
    (tmp_path / name).write_bytes(FILES[name])
    found, bad, examples = whole(SourceConfig(name="s", path=str(tmp_path / name)), True)  # type: ignore[misc]  # no error
    expected, wrong = [], []
    for number, line in enumerate(FILES[name].split(b"\n"), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = 0
        if isinstance(record, dict):
            expected.append((f"{tmp_path / name}, line {number}", record))
        elif record is not None:
            wrong.append(f"{tmp_path / name}, line {number}:")
    assert found == expected and bad == len(wrong)
    assert all(example.startswith(where) for example, where in zip(examples, wrong, strict=False))


@pytest.mark.parametrize("file", sorted(BAD), ids=lambda file: file.name)
def test_units_of_the_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    content = file.read_bytes()
    plain = tmp_path / "plain.jsonl"
    try:
        plain.write_bytes(gzip.decompress(content) if file.suffix == ".gz" else content)
    except EOFError:
        plain.write_bytes(content)  # cut off: as it is
    for path in (plain, file):
        source = SourceConfig(name="s", path=str(path))
        expected = [whole(source, skip) for skip in (True, False)]
        make_tiny(monkeypatch, 5000)
        assert [outcome(source, shares_of(source), skip) for skip in (True, False)] == expected


@pytest.mark.parametrize("size", [1, 500, 1 << 20])
def test_units_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    texts = [f"text {i} " + "w" * (i % 50) for i in range(300)]
    bad = pa.array([b"voil\xe0" if i in (11, 222) else text.encode() for i, text in enumerate(texts)]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet", row_group_size=7)
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for i, text in enumerate(texts):
        writer.write(b"voil\xe0" if i in (11, 222) else text.encode())
    writer.close()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved", num_shards=3)
    for name, fewest in (("a.parquet", 40), ("a.array_record", 250), ("saved", 3)):
        source = SourceConfig(name="s", path=str(tmp_path / name))
        expected = [whole(source, skip) for skip in (True, False)]
        make_tiny(monkeypatch, size)
        shares = shares_of(source)
        assert len(shares) == 1 if size == 1 << 20 else len(shares) >= (fewest if size == 1 else 3)
        if name == "saved":  # its units are its files
            ((found, *_), (all_, *_)) = outcome(source, shares, True), expected[0]
            assert [record for _, record in found] == [record for _, record in all_]
        else:
            assert [outcome(source, shares, skip) for skip in (True, False)] == expected


def test_a_file_behind_an_address_is_read_by_ranges_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fsspec.filesystem("memory").open("/units/a.jsonl", "wb") as stream:
        stream.write(FILES["bad lines.jsonl"])
    source = SourceConfig(name="s", path="memory://units/a.jsonl")
    expected = whole(source, True)
    make_tiny(monkeypatch, 64)
    assert len(shares_of(source)) > 10
    assert outcome(source, shares_of(source), True) == expected
    monkeypatch.setattr(units, "can_seek", lambda path: False)
    assert shares_of(source) == [Unit("memory://units/a.jsonl", size=len(FILES["bad lines.jsonl"]))]
    assert not files.can_seek(f"zip://a.jsonl::{tmp_path}/a.zip")


def test_a_unit_reads_its_own_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES * 100)
    make_tiny(monkeypatch, 3000)
    source = SourceConfig(name="s", path=str(tmp_path / "a.jsonl"))
    shares = shares_of(source)
    taken = []
    original = sources._bytes
    monkeypatch.setattr(
        sources, "_bytes", lambda file, start: (taken.append(len(b)) or b for b in original(file, start))
    )
    for unit in shares:
        outcome(source, [unit], True)
    assert sum(taken) < 2.2 * len(LINES * 100)
    assert sum(unit.size for unit in shares) == len(LINES * 100)


def test_lines_are_counted_only_for_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES * 3 + b"{\n")
    make_tiny(monkeypatch, 100)
    source = SourceConfig(name="s", path=str(tmp_path / "a.jsonl"))
    before = lines_before.cache_info().misses
    shares = shares_of(source)
    for unit, skip in itertools.product(shares, (True, False)):
        census = Census(skip)
        lumps = sources.read_lumps(source, unit.file, ("text",), census, unit)
        if unit is not shares[-1] or skip:
            assert sum(1 for lump in lumps for _ in lump.parse(census)) >= 0
            assert lines_before.cache_info().misses == before
        else:
            with pytest.raises(ValueError, match=r"a.jsonl, line 37: malformed"):
                list(itertools.chain.from_iterable(lump.parse(census) for lump in lumps))
