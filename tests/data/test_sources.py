"""Every format gives the same records; every fault is named with its file and line."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records import sources
from mixtral_jax.data.records.lump import Census
from mixtral_jax.data.records.selection import source_files
from mixtral_jax.data.records.sources import read_lumps, text_size_estimate, with_text_column
from mixtral_jax.data.records.units import units_of

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = gzip.decompress((ROOT / "data" / "samples" / "fr.val.jsonl.gz").read_bytes())
RECORDS = [json.loads(line) for line in SAMPLE.splitlines()[:20]]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def _read(path: str | tuple[str, ...], skip: bool = False, **options: Any) -> tuple[list[Any], Census]:
    source = SourceConfig(name="s", path=path, **options)
    census = Census(skip)
    found = [
        record
        for file in source_files(source)
        for lump in read_lumps(source, file, ("text", "messages"), census)
        for _, record in lump.parse(census)
    ]
    return found, census


def _texts(path: Any, **options: Any) -> list[str]:
    return [record["text"] for record in _read(str(path), **options)[0]]


def _array_record(path: Path, records: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def _long_zstd(content: bytes, window_log: int) -> bytes:
    """As `zstd --long` streams it: without its size, so that the window counts."""
    settings = zstandard.ZstdCompressionParameters(window_log=window_log)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return stream.compress(content) + stream.flush()


class _Help(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set of the sample, made as the TFDS guide says but for TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # nothing to download: else TFDS looks for a checksums file beside this test

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _: Any) -> Any:
        return {"train": self._generate_examples(), "test": iter([(0, {"text": "testé", "number": 0})])}

    def _generate_examples(self) -> Any:
        for i, text in enumerate(TEXTS):
            yield i, {"text": text, "number": i}


# --- formats ---


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        ("A.JSONL.GZ", gzip.compress),
        ("A.JSON.Zst", zstandard.ZstdCompressor().compress),
        ("two.jsonl.gz", lambda b: gzip.compress(b[:3000]) + gzip.compress(b[3000:]) + b"\0" * 100),
        ("two.jsonl.zst", lambda b: zstandard.compress(b[:3000]) + zstandard.compress(b[3000:])),
        ("blank.jsonl", lambda b: b.replace(b"\n", b"\r\n\n")),
        ("open.jsonl", lambda b: b.rstrip(b"\n")),
        ("long.jsonl.zst", lambda b: _long_zstd(b, 28)),
        ("mark.jsonl", lambda b: codecs.BOM_UTF8 + b),
        ("marks.jsonl.gz", lambda b: b"".join(gzip.compress(codecs.BOM_UTF8 + x) for x in b.splitlines(True))),
    ],
)
@pytest.mark.parametrize("lump_bytes", [1, 5000, 1 << 20])
def test_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pack: Callable[[bytes], bytes], lump_bytes: int
) -> None:
    monkeypatch.setattr(sources, "LUMP_BYTES", lump_bytes)
    monkeypatch.setattr(sources, "_READ_BYTES", 1000)
    (tmp_path / name).write_bytes(pack(LINES))
    assert _read(str(tmp_path / name))[0] == RECORDS


@pytest.mark.parametrize(
    ("name", "read_bytes"), [("a.json", 20), ("a.json", 1000), ("a.jsonl", 50), ("a.json.gz", 900)]
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, indent: int | None, read_bytes: int
) -> None:
    monkeypatch.setattr(sources, "LUMP_BYTES", 2000)
    monkeypatch.setattr(sources, "_READ_BYTES", read_bytes)
    records = [{"text": 'é "]},[{ \\'}, *RECORDS[:5]]
    content = ("\ufeff \n" + json.dumps(records, ensure_ascii=False, indent=indent) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert _read(str(tmp_path / name))[0] == records


@pytest.mark.parametrize(
    ("content", "read", "sentence"),
    [
        ('[{"text": "a"}, {"text": "b"', 1, "the JSON array has no end .* after record 1; nothing behind it is read"),
        ('[{"text": "a"}', 1, "the JSON array has no end"),
        ('[{"text": "a"}] [', 1, "the JSON array has no end .*, or something follows it, after record 1"),
        ('[{"text": "a"},]', 1, "malformed JSON .* after record 1"),
        ('[{"text": "a"} {"text": "b"}]', 1, r"malformed JSON \(no comma\) after record 1"),
        ('[{"text": "a"}, {text: 1}' + " " * 5000 + "]", 1, "malformed JSON .* after record 1"),
        ('[{"text": "a"}, 3, {"text": "b"}]', 2, "record 2: expected a JSON object, found a number"),
        ('[{"text": ' + "[" * 100_000, 0, "recursion .*after record 0"),
        (b'[{"text": "a"}, {"text": "\xe9"}, {"text": "b"}]', 2, "record 2: not UTF-8"),
        (b'[{"text": "a"}, {"text": "\xe9"', 1, "the JSON array has no end .* after record 1"),
        ('[null, "a,[", -1.5e+3, {"text": "b"}]', 1, "record 1: expected a JSON object, found null"),
        ('[{"text": "a"}, {"text": ' + "1" * 5000 + "}]", 1, r"malformed JSON \(Exceeds the limit .* after record 1"),
        ("[]", 0, ""),
    ],
)
def test_a_faulty_array_gives_what_stands_before_the_fault(
    tmp_path: Path, content: str | bytes, read: int, sentence: str
) -> None:
    (tmp_path / "f.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    if sentence:
        with pytest.raises(ValueError, match=f"f.json[:,] .*{sentence}"):
            _read(str(tmp_path / "f.json"))
    records, census = _read(str(tmp_path / "f.json"), skip=True)
    assert (len(records), census.bad) == (read, 3 if "null" in sentence else bool(sentence))


def test_a_large_record_of_an_array_is_not_parsed_with_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"text": TEXTS[0]}, {"text": "a", "messages": [{"content": "words " * 10}] * 500}, {"text": "b"}]
    (tmp_path / "f.json").write_text(json.dumps(records))
    parsed = []

    class Decoder(json.JSONDecoder):
        def raw_decode(self, text: str, at: int = 0) -> Any:
            parsed.append(len(text) - at)
            return super().raw_decode(text, at)

    monkeypatch.setattr(sources.json, "JSONDecoder", Decoder)
    monkeypatch.setattr(sources, "_READ_BYTES", 100)
    assert _read(str(tmp_path / "f.json"))[0] == records
    assert sum(parsed) < 6 * len(json.dumps(records))
    monkeypatch.setattr(sources, "_RECORD_CHARS", 2000)
    with pytest.raises(
        ValueError, match=r"f.json: a record of more than 0 MB .*write it as JSON lines.* after record 1"
    ):
        _read(str(tmp_path / "f.json"))


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "other": list(range(len(TEXTS)))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    records, _ = _read(str(tmp_path / "a.parquet"))
    assert records == [{"text": text} for text in TEXTS]


def test_parquet_with_chats(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    pq.write_table(pa.table({"messages": chats}), tmp_path / "a.parquet")
    assert _read(str(tmp_path / "a.parquet"))[0] == [{"messages": chat} for chat in chats]


@pytest.mark.parametrize("as_json", [True, False])
def test_array_record(tmp_path: Path, as_json: bool) -> None:
    records = [json.dumps({"text": t}).encode() if as_json else t.encode() for t in [*TEXTS, "{ not json"]]
    records += [("\ufeff\n " + json.dumps({"text": "marked"})).encode(), "\ufeff text".encode()]
    path = _array_record(tmp_path / "a.array_record-00000-of-00001", records)
    assert _texts(path) == [*TEXTS, "{ not json", "marked", " text"]


def test_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02d}.txt").write_text(text, newline="")
    assert _texts(tmp_path / "*.txt") == TEXTS
    assert _texts(tmp_path) == TEXTS
    monkeypatch.setattr(sources, "TEXT_PIECE_BYTES", 200)
    monkeypatch.setattr(sources, "_READ_BYTES", 100)
    pieces = _texts(tmp_path / "00.txt")
    assert len(pieces) > 1
    assert "".join(pieces) == TEXTS[0]
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    (tmp_path / "00.txt").write_text("\ufeffmarked")
    assert _texts(tmp_path / "00.txt") == ["marked"]


def test_hugging_face_datasets_saved_on_disk(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert _texts(tmp_path / "one") == TEXTS
    both = datasets.DatasetDict(train=data, test=data.select(range(2)))
    both.save_to_disk(tmp_path / "both")
    assert _texts(tmp_path / "both", split="test") == TEXTS[:2]
    with pytest.raises(ValueError, match=r"has the splits train, test: set split"):
        _read(str(tmp_path / "both"))
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00003.arrow is missing, though .*state.json names it"):
        _read(str(tmp_path / "one"))


def test_tfds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = _Help(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    directory = str(builder.data_dir)
    assert sorted(_texts(directory)) == sorted(TEXTS)
    assert _texts(directory, split="test") == ["testé"]
    source, whole = SourceConfig(name="s", path=directory), _texts(directory)
    monkeypatch.setattr(sources, "UNIT_BYTES", 1)
    shares = units_of(source, directory)
    lumps = [lump for unit in shares for lump in read_lumps(source, directory, ("text",), Census(False), unit)]
    assert len(shares) == len(TEXTS)
    assert [record["text"] for lump in lumps for _, record in lump.parse(Census(False))] == whole
    with pytest.raises(ValueError, match=r"has the splits .*train.*: set split"):
        _read(directory, split="dev")
    info = Path(directory) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="holds tfrecord files, which need TensorFlow"):
        _read(directory)


def test_several_files_globs_and_directories(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.parquet"):
        (tmp_path / name).touch()
    source = SourceConfig(name="s", path=(f"{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl", str(tmp_path)))
    assert [Path(f).name for f in source_files(source)] == ["b.jsonl", "a.jsonl", "c.parquet"]


def test_the_size_of_text_is_guessed_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 1000)
    assert text_size_estimate([f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl.gz"]) == 5000


@pytest.mark.parametrize("saved", ["a.parquet", "saved"])
def test_values_that_datasets_keeps_as_json_are_what_they_were(tmp_path: Path, saved: str) -> None:
    records = [
        {"text": "a", "messages": [{"role": "user", "content": "b"}, {"content": [{"type": "c", "d": None}]}]},
        {"text": "null", "messages": [{"name": "e", "content": {"f": {"g": [1, "h", None]}}}]},
    ]
    data = datasets.Dataset.from_list(records, on_mixed_types="use_json")
    assert "Json" in str(data.features)
    data.to_parquet(tmp_path / saved) if saved == "a.parquet" else data.save_to_disk(tmp_path / saved)
    assert _read(str(tmp_path / saved))[0] == records


def test_values_kept_as_json_anywhere_in_a_row(tmp_path: Path) -> None:
    as_text = pa.schema({"text": pa.string(), "messages": pa.list_(pa.struct({"a": pa.string(), "b": pa.string()}))})
    as_json = pa.schema({"text": pa.json_(), "messages": pa.list_(pa.struct({"a": pa.json_(), "b": pa.string()}))})
    message = {"a": '{"y": null, "z": "[1]"}', "b": "[1]"}
    rows = [{"text": '"a"', "messages": [message, {"a": None}]}, {"text": "{", "messages": None}, {"text": '"b"'}]
    pq.write_table(pa.Table.from_pylist(rows, schema=as_text).cast(as_json), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, record 2: Expecting property name"):
        _read(str(tmp_path / "a.parquet"))
    expected = {"text": "a", "messages": [{"a": {"y": None, "z": "[1]"}, "b": "[1]"}, {}]}
    assert _read(str(tmp_path / "a.parquet"), skip=True)[0] == [expected, {"text": "b", "messages": None}]


def test_a_map_with_one_key_twice_is_one_bad_record(tmp_path: Path) -> None:
    rows = [{"text": {}}, {"text": [("a", 1), ("a", 2)]}, {"text": {"a": 3}}]
    kinds = pa.schema({"text": pa.map_(pa.string(), pa.int64())})
    pq.write_table(pa.Table.from_pylist(rows, schema=kinds), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, record 2: "):
        _read(str(tmp_path / "a.parquet"))
    assert _read(str(tmp_path / "a.parquet"), skip=True)[0] == [{"text": {}}, {"text": {"a": 3}}]


def _with_a_bad_one(path: Path) -> Path:
    """Three records, of which the second is not UTF-8."""
    texts = [b"one", b"voil\xe0", b"three"]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts).view(pa.string())}), path)
    elif path.suffix == ".json":
        path.write_bytes(b"[" + b",".join(b'{"text": "%b"}' % text for text in texts) + b"]")
    else:
        _array_record(path, texts)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.array_record", "a.json"])
def test_a_record_behind_a_bad_one_keeps_its_number(tmp_path: Path, name: str) -> None:
    source, census = SourceConfig(name="s", path=str(_with_a_bad_one(tmp_path / name))), Census(skip=True)
    lumps = read_lumps(source, str(source.path), ("text",), census)
    found = [(number, record["text"]) for lump in lumps for number, record in lump.parse(census)]
    assert (found, census.bad) == ([(1, "one"), (3, "three")], 1)
    assert f"{name}, record 2: not UTF-8" in census.bad_examples[0]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"_data_files": [1], "splits": 2}', "[" * 100_000])
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_data_set_whose_notes_are_damaged(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        _read(str(tmp_path))


# --- faults ---

_CUT = LINES.split(b"\n")
FAULTS = {
    "cut line": (b"\n".join([*_CUT[:4], _CUT[4][:50], *_CUT[5:]]), r"f.jsonl, line 5: malformed JSON \(Unterminated"),
    "latin-1": (
        b"\n".join([*_CUT[:2], '{"text": "é"}'.encode("latin-1"), *_CUT[3:]]),
        r"f.jsonl, line 3: not UTF-8 \(byte 11 of the line\)",
    ),
    "a list": (b"[1]\n" + LINES, r"f.jsonl, line 1: expected a JSON object, found a list"),
    "a number": (b"\n\n7\n" + LINES, r"f.jsonl, line 3: expected a JSON object, found a number"),
    "over several lines": (b'{"data": [\n', r"f.jsonl, line 1: malformed JSON .*over several lines\? each has to be"),
    "deep": (b"[" * 200_000 + b"\n" + LINES, r"f.jsonl, line 1: malformed JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_named(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        _read(str(tmp_path / "f.jsonl"))
    assert "\n" not in str(caught.value)
    records, census = _read(str(tmp_path / "f.jsonl"), skip=True)
    assert census.bad == 1
    assert census.bad_examples[0] == str(caught.value)
    assert len(records) in (0 if "lines" in fault else len(RECORDS), len(RECORDS) - 1)


def test_line_numbers_go_on_from_lump_to_lump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LUMP_BYTES", 100)
    monkeypatch.setattr(sources, "_READ_BYTES", 150)
    (tmp_path / "f.jsonl").write_bytes(LINES + b"{\n")
    with pytest.raises(ValueError, match=f"f.jsonl, line {len(RECORDS) + 1}: malformed"):
        _read(str(tmp_path / "f.jsonl"))


@pytest.mark.parametrize(("extension", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_file_that_is_cut_off_gives_its_whole_lines(
    tmp_path: Path, extension: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"f.jsonl.{extension}"
    whole = compress(LINES)
    path.write_bytes(whole[:-1] if extension == "zst" else whole[: len(whole) * 6 // 10])
    with pytest.raises(ValueError, match=r"cut off \(an incomplete download\?\) after line \d+$"):
        _read(str(path))
    records, census = _read(str(path), skip=True)
    assert census.bad == 1
    assert records == RECORDS[: len(records)]
    assert f"after line {len(records)}" in census.bad_examples[0]


def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl.gz").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"f.jsonl.gz: damaged, or not compressed as its name says .* after line 0"):
        _read(str(tmp_path / "f.jsonl.gz"))
    damaged = bytearray(gzip.compress(LINES))
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "f.jsonl.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"f.jsonl.gz: damaged"):
        _read(str(tmp_path / "f.jsonl.gz"))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_bytes("voilà".encode("latin-1"))
    with pytest.raises(ValueError, match=r"f.txt, part 1: not UTF-8 \(byte 5\)"):
        _read(str(tmp_path / "f.txt"))
    path = _array_record(tmp_path / "f.array_record", ["voilà".encode("latin-1"), b"fine"])
    with pytest.raises(ValueError, match=r"f.array_record, record 1: not UTF-8"):
        _read(str(path))
    records, census = _read(str(path), skip=True)
    assert (records, census.bad) == ([{"text": "fine"}], 1)


@pytest.mark.parametrize("name", ["f.parquet", "f.arrow"])
def test_bytes_of_a_column_of_text_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    texts = pa.array([b"one", b"voil\xe0", b"three"]).view(pa.string())  # a writer checks no more than this does
    table = pa.table({"text": texts})
    if name == "f.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=f"{name}, record 2: not UTF-8"):
        _read(str(tmp_path / name))
    records, census = _read(str(tmp_path / name), skip=True)
    assert (records, census.bad) == ([{"text": "one"}, {"text": "three"}], 1)


@pytest.mark.parametrize(
    ("name", "kind"), [("f.parquet", "Parquet"), ("f.arrow", "Arrow"), ("f.array_record", "ArrayRecord")]
)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(ValueError, match=f"{name} cannot be read as {kind}"):
        _read(str(tmp_path / name))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": TEXTS}), tmp_path / "f.parquet")
    with pytest.raises(ValueError, match=r"f.parquet has no column text or messages: it has content"):
        _read(str(tmp_path / "f.parquet"))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/nothing.jsonl", f"{tmp_path}/*.jsonl"):
        with pytest.raises(ValueError, match="source 's': no file matches"):
            _read(path)
    with pytest.raises(ValueError, match="without data files that are known by name"):
        _read(str(tmp_path))
    (tmp_path / "data.bin").touch()
    with pytest.raises(ValueError, match=r"the name of .*data.bin does not say its format"):
        _read(f"{tmp_path}/data.bin")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.txt", "f.jsonl.gz"])
def test_utf16_is_refused_by_name(tmp_path: Path, encoding: str, name: str) -> None:
    content = LINES.decode().encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{name} is UTF-16 text: make it UTF-8"):
        _read(str(tmp_path / name), skip=True)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2", "xz", "Parquet", "Arrow", "a zip archive"])
@pytest.mark.parametrize("name", ["f.jsonl", "f.txt"])
def test_a_text_that_is_something_else_is_said_to_be_that(tmp_path: Path, kind: str, name: str) -> None:
    stream, table = io.BytesIO(), pa.table({"text": TEXTS})
    if kind == "Parquet":
        pq.write_table(table, stream)
    elif kind == "Arrow":
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    elif kind == "a zip archive":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("f.jsonl", LINES)
    packed = {"gzip": gzip.compress, "zstd": zstandard.compress, "bzip2": bz2.compress, "xz": lzma.compress}
    (tmp_path / name).write_bytes(packed[kind](LINES) if kind in packed else stream.getvalue())
    with pytest.raises(ValueError, match=f"{name} is no text: it holds {kind}; give it the name that says so"):
        _read(str(tmp_path / name), skip=True)


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
def test_an_archive_that_is_damaged_inside(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / name)
    (tmp_path / "f.jsonl").write_bytes(LINES)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / name, name)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[100] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}::.*a.zip cannot be read.*: .*Bad CRC-32"):
        _read(f"zip://{name}::{tmp_path}/a.zip", skip=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_files_behind_an_address_are_the_same_records(name: str) -> None:
    memory = fsspec.filesystem("memory")
    with memory.open(f"/sources/{name}", "wb") as stream:
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": TEXTS}), stream)
        elif name.endswith("arrow"):
            with pa.ipc.new_stream(stream, pa.schema({"text": pa.string()})) as writer:
                writer.write_table(pa.table({"text": TEXTS}))
        else:
            stream.write(gzip.compress(LINES) if name.endswith("gz") else LINES)
    assert _texts(f"memory://sources/{name}") == TEXTS
    assert text_size_estimate([f"memory://sources/{name}"]) > 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.array_record"])
@pytest.mark.parametrize("others", [{"number": 1}, {"title": "of it"}, {"text": "own"}])
def test_a_text_column_of_another_name_is_found_where_there_is_one(
    tmp_path: Path, name: str, others: dict[str, Any]
) -> None:
    records = [{"content": text, **others} for text in TEXTS]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(records), tmp_path / name)
    elif name.endswith("jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        _array_record(tmp_path / name, [json.dumps(record).encode() for record in records])
    source = SourceConfig(name="s", path=str(tmp_path / name))
    found = with_text_column(source, source_files(source)).text_key
    assert found == ("content" if "number" in others else "text")
    assert with_text_column(source.model_copy(update={"text_key": "title"}), [name]).text_key == "title"


@pytest.mark.parametrize("beside", [[{"role": "user", "content": "a"}], {"text": "words"}])
def test_a_text_column_is_not_guessed_beside_a_chat(tmp_path: Path, beside: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "f.jsonl").write_text(json.dumps({"id": "17"}) + "\n" + json.dumps({"id": "18", "a": beside}) + "\n")
    source = SourceConfig(name="s", path=str(tmp_path))
    assert with_text_column(source, source_files(source)).text_key == "text"
    (tmp_path / "f.jsonl").write_text('{"content": "words"}\n')
    assert with_text_column(source, source_files(source)).text_key == "content"
