"""Preparation: the rows, the cache, several workers, machines and processes, and every way of being interrupted."""

import contextlib
import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax.data.prepare import pack
from mixtral_jax.data.prepare import prepared as prepare_module
from mixtral_jax.data.prepare.cache import FORMAT_VERSION
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.records import sources
from mixtral_jax.train.errors import ExitCode, failure_of
from tests.prepared import (
    MODEL,
    SAMPLES,
    SEQ_LEN,
    TOKENIZER,
    config_of,
    documents_of,
    leftovers,
    lines_of,
    prepare_one,
    records_of,
    texts_of,
)

# --- the rows ---


@pytest.mark.usefixtures("small_lumps")
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_rows_hold_the_documents_and_nothing_else(tmp_path: Path, packing: str) -> None:
    path = tmp_path / "short.jsonl"
    texts = [t[:100] for t in texts_of(SAMPLES / "fr.val.jsonl.gz")]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = prepare_one(config_of(tmp_path / "cache", path, packing=packing))
    expected = [(TOKENIZER.bos_id, *TOKENIZER.encode(t), TOKENIZER.eos_id) for t in texts]
    rows = [source.format.decode(record) for record in records_of(source)]
    assert source.rows == len(rows)
    assert source.documents == len(texts)
    assert source.text_bytes == sum(len(t.encode()) for t in texts)
    assert source.targets == sum(len(d) - 1 for d in expected) == sum(r.weights.sum() for r in rows)
    targets = Counter(int(t) for r in rows for t, w in zip(r.targets, r.weights, strict=True) if w)
    assert targets == Counter(t for d in expected for t in d[1:])
    assert not targets[TOKENIZER.bos_id]
    assert targets[TOKENIZER.eos_id] == len(texts)
    if packing == "best_fit":  # every document here fits a row
        assert max(map(len, expected)) <= SEQ_LEN + 1
        assert source.split == 0
        assert Counter(documents_of(source)) == Counter(expected)


@pytest.mark.usefixtures("small_lumps")
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_sizes_of_rows_are_their_tokens_and_the_bytes_of_their_text(tmp_path: Path, packing: str) -> None:
    path = lines_of(tmp_path, SAMPLES / "fr.val.jsonl.gz")
    source = prepare_one(config_of(tmp_path / "cache", path, packing=packing))
    sizes = source.sizes()
    assert (sizes.shape, sizes.dtype) == ((source.rows, 2), np.uint32)
    assert isinstance(sizes, np.memmap)
    assert sizes[:, 1].sum() == source.text_bytes == sum(len(text.encode()) for text in texts_of(path))
    documents = {}  # its first tokens -> (tokens, bytes)
    for text in texts_of(path):
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]
        documents[tuple(ids[:30])] = len(ids), len(text.encode())
    for record, (tokens, text_bytes) in zip(records_of(source), sizes.tolist(), strict=True):
        n = int(np.frombuffer(record, np.uint32, 1)[0])
        lengths = np.frombuffer(record, np.uint32, n, offset=4).tolist()
        ids = np.frombuffer(record, source.format.token_dtype, offset=4 * (n + 1)).tolist()
        assert tokens == sum(lengths) == len(ids)
        starts = [sum(lengths[:i]) for i in range(n)]
        own = [documents.get(tuple(ids[start : start + 30])) for start in starts]
        if all(own):  # of rows in which only beginnings of documents are
            share = sum(size * length / whole for (whole, size), length in zip(own, lengths, strict=True))
            assert abs(share - text_bytes) < n


def test_rows_of_a_document_in_several_share_its_bytes(tmp_path: Path) -> None:
    text = "ça " * 200
    (tmp_path / "f.jsonl").write_text(json.dumps({"text": text}))
    sizes = prepare_one(config_of(tmp_path / "cache", tmp_path / "f.jsonl")).sizes().astype(int)
    length = len(TOKENIZER.encode(text)) + 2
    ends = np.minimum((np.arange(len(sizes)) + 1) * SEQ_LEN + 1, length)
    np.testing.assert_array_equal(np.cumsum(sizes[:, 1]), len(text.encode()) * ends // length)


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_examples_have_no_bytes_of_text(tmp_path: Path, kind: str) -> None:
    record = {"prompt": "a", "completion": "b", "chosen": "c d e", "rejected": "f"}
    (tmp_path / "f.jsonl").write_text(json.dumps(record))
    source = prepare_one(config_of(tmp_path / "cache", tmp_path / "f.jsonl", examples=kind))
    assert source.sizes().tolist() == [[source.tokens, 0]] and source.text_bytes == 0


def test_padding_share_is_what_the_rows_show(tmp_path: Path) -> None:
    source = prepare_one(config_of(tmp_path, packing="best_fit"))
    used = 0
    for record in records_of(source):
        n = int(np.frombuffer(record, np.uint32, 1)[0])
        used += int(np.frombuffer(record, np.uint32, n, offset=4).sum())
    assert source.tokens == used
    assert source.padding == pytest.approx(1 - used / (source.rows * (SEQ_LEN + 1)))
    summary = prepare(config_of(tmp_path, packing="best_fit"), SEQ_LEN, 0).summary()
    assert f"{100 * source.padding:.2f} % padding" in summary


@pytest.mark.usefixtures("small_lumps")
def test_documents_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    rows = [records_of(prepare_one(config_of(tmp_path), seed)) for seed in (0, 1)]
    assert rows[0] != rows[1]
    order = _first_tokens(rows[0])
    in_file = [TOKENIZER.encode(t)[0:6] for t in texts_of(SAMPLES / "fr.val.jsonl.gz")]
    positions = [in_file.index(o) for o in order if o in in_file]
    assert len(positions) > 30
    assert abs(np.corrcoef(positions, np.arange(len(positions)))[0, 1]) < 0.5


def _first_tokens(records: list[bytes]) -> list[list[int]]:
    found = []
    for record in records:
        n = int(np.frombuffer(record, np.uint32, 1)[0])
        tokens = np.frombuffer(record, np.uint16, offset=4 * (n + 1)).tolist()
        found += [tokens[i + 1 : i + 7] for i, t in enumerate(tokens) if t == TOKENIZER.bos_id]
    return found


# --- who does the work changes nothing ---


@pytest.mark.usefixtures("small_lumps")
def test_parts_on_many_machines_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines_of(tmp_path, SAMPLES / "fr.val.jsonl.gz")
    alone = prepare_one(config_of(tmp_path / "alone", path))
    assert len(alone.shards) > 3
    together = config_of(tmp_path / "together", path)
    read: list[int] = []
    original = sources._bytes
    monkeypatch.setattr(sources, "_bytes", lambda *at: (read.append(len(b)) or b for b in original(*at)))
    for index in (3, 1):
        result = prepare(together, SEQ_LEN, 0, part=(index, 3), progress=False)
        assert result.missing_parts
        assert sum(read) < path.stat().st_size * 0.7  # a third, what is behind its units' ends, and the beginning
        read.clear()
    assert result.missing_parts == ("fr: part-2 of 3",)
    merged = prepare_one(together, part=(2, 3))
    assert records_of(merged) == records_of(alone)
    assert merged.model_copy(update={"directory": alone.directory}) == alone
    assert not list((tmp_path / "together").glob("*parts*"))
    with pytest.raises(ValueError, match=r"part 4/3"):
        prepare(together, SEQ_LEN, 0, part=(4, 3))


@pytest.mark.usefixtures("small_lumps")
def test_parts_count_what_is_bad_as_one_machine_does(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, SAMPLES / "fr.val.jsonl.gz").read_text().splitlines(keepends=True)
    (tmp_path / "f.jsonl").write_text("".join(line + "{\n" * (i % 9 == 5) for i, line in enumerate(lines)))
    alone = prepare_one(config_of(tmp_path / "alone", tmp_path / "f.jsonl", on_error="skip"))
    together = config_of(tmp_path / "together", tmp_path / "f.jsonl", on_error="skip")
    for index in (4, 2, 1):
        prepare(together, SEQ_LEN, 0, part=(index, 4), progress=False)
    merged = prepare_one(together, part=(3, 4))
    assert alone.bad > 5
    assert [message.split(":")[0].split()[-1] for message in alone.bad_examples] == ["7", "17", "27", "37", "47"]
    assert (merged.bad, merged.bad_examples) == (alone.bad, alone.bad_examples)
    assert records_of(merged) == records_of(alone)


def test_workers_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    for file in SAMPLES.glob("*.val.jsonl.gz"):
        lines_of(tmp_path, file)
    path = str(tmp_path / "*.jsonl")
    serial = prepare_one(config_of(tmp_path / "1", path, workers=1))
    parallel = prepare_one(config_of(tmp_path / "2", path, workers=2))
    assert records_of(parallel) == records_of(serial)


@pytest.mark.parametrize("workers", [1, 2])
def test_of_several_errors_the_first_in_the_order_of_the_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Also before one that is seen while the work is planned."""
    monkeypatch.setattr(prepare_module, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(sources, "UNIT_BYTES", 5000)
    lines = "".join(json.dumps({"text": "des mots " * 9}) + "\n" for _ in range(300))
    (tmp_path / "a.jsonl").write_text(lines + "{\n" + lines + "[]\n")
    (tmp_path / "b.jsonl").write_bytes(lines.encode("utf-16"))
    with pytest.raises(ValueError, match=r"a.jsonl, line 301: malformed"):
        prepare_one(config_of(tmp_path / "cache", tmp_path / "*.jsonl", workers=workers))


def test_progress_ends_where_it_said_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    lines_of(tmp_path, SAMPLES / "fr.val.jsonl.gz")
    shutil.copy(SAMPLES / "de.val.jsonl.gz", tmp_path)
    told: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def meter(title: str, total: int, **_: Any) -> Iterator[Any]:
        steps = told[title] = [-total]
        yield lambda size, note: steps.append(size)

    for module in ("tokenise", "pack"):
        monkeypatch.setattr(f"mixtral_jax.data.prepare.{module}.meter", meter)
    for workers in (1, 2):
        prepare_one(config_of(tmp_path / f"{workers}", [str(f) for f in tmp_path.glob("*.jsonl*")], workers=workers))
        assert [sum(steps) for steps in told.values()] == [0, 0]
        assert len(told["Tokenising"]) > 10


def test_an_error_in_a_worker_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_SERIAL_BYTES", 0)
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"f.jsonl, line 2: 'text' is not a string"):
        prepare_one(config_of(tmp_path / "cache", tmp_path / "f.jsonl", workers=2))
    assert leftovers(tmp_path / "cache") == []


# --- the cache ---


def test_a_second_run_only_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_one(config_of(tmp_path))
    monkeypatch.setattr(prepare_module, "_make", lambda todo, *rest: [] if not todo else None)
    assert prepare_one(config_of(tmp_path)) == first


def test_everything_that_changes_the_rows_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "one", "other": "two"}\n')
    shutil.copy(MODEL, tmp_path / "t.model")
    base = config_of(tmp_path / "cache", path)
    seen = {prepare_one(base).fingerprint}
    other_column = base.train[0].model_copy(update={"text_key": "other"})
    for changed in (
        {"train": (other_column,)},
        {"packing": "best_fit"},
        {"on_error": "skip"},
    ):
        seen.add(prepare_one(base.model_copy(update=changed)).fingerprint)
    seen.add(prepare_one(base, seed=1).fingerprint)
    seen.add(prepare_one(base, seq_len=32).fingerprint)
    same = [prepare_one(base.model_copy(update={"tokenizer": str(tmp_path / "t.model")})).fingerprint]
    shutil.copy(path, tmp_path / "copy.jsonl")
    same.append(prepare_one(config_of(tmp_path / "cache", tmp_path / "copy.jsonl")).fingerprint)
    renamed = base.train[0].model_copy(update={"name": "new", "weight": 3.0})
    same.append(prepare_one(base.model_copy(update={"train": (renamed,)})).fingerprint)
    assert len(seen) == 6
    assert set(same) == {prepare_one(base).fingerprint}
    path.write_text('{"text": "One", "other": "two"}\n')
    assert prepare_one(base).fingerprint not in seen


def test_an_edit_of_equal_size_and_date_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "one"}\n')
    before = os.stat(path)
    first = prepare_one(config_of(tmp_path / "cache", path))
    path.write_text('{"text": "two"}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    second = prepare_one(config_of(tmp_path / "cache", path))
    assert second.fingerprint != first.fingerprint
    assert documents_of(second) == [(TOKENIZER.bos_id, *TOKENIZER.encode("two"), TOKENIZER.eos_id)]


@pytest.mark.parametrize("damage", ["shard gone", "shard cut", "meta cut", "meta of another version"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    source = prepare_one(config_of(tmp_path))
    expected = records_of(source)
    shard, meta = Path(source.paths[0]), Path(source.directory) / "meta.json"
    if damage == "shard gone":
        shard.unlink()
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "meta cut":
        meta.write_text(meta.read_text()[:-20])
    else:
        meta.write_text(meta.read_text().replace(f'"version": {FORMAT_VERSION}', '"version": 0'))
    assert records_of(prepare_one(config_of(tmp_path))) == expected


def test_a_part_that_was_damaged_is_not_packed_and_is_made_again(tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache")
    prepare(config, SEQ_LEN, 0, part=(1, 2), progress=False)
    (part,) = (tmp_path / "cache").glob("*.parts-of-2/part-1")
    shutil.rmtree(part / "000000")
    assert prepare(config, SEQ_LEN, 0, part=(2, 2), progress=False).missing_parts == ("fr: part-1 of 2",)
    again = prepare(config, SEQ_LEN, 0, part=(1, 2), progress=False)
    assert records_of(again.train[0]) == records_of(prepare_one(config_of(tmp_path / "whole")))


# --- bad input ---


def test_bad_records_are_skipped_counted_and_shown(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', "{", '{"text": 1}', '{"text": ""}', '{"text": "fine"}'] + ["[]"] * 5
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    config = config_of(tmp_path / "cache", tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match=r"f.jsonl, line 2: malformed JSON"):
        prepare_one(config)
    data = prepare(config.model_copy(update={"on_error": "skip"}), SEQ_LEN, 0, progress=False)
    (source,) = data.train
    assert (source.documents, source.bad, source.empty, len(source.bad_examples)) == (2, 7, 1, 5)
    assert "7 bad records passed over" in data.summary()
    assert "f.jsonl, line 3: 'text' is not a string" in data.summary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no documents to learn from in .*f.jsonl, which has no records"),
        (b'{"text": ""}\n', "no documents to learn from in .*f.jsonl, which has 1 empty records"),
    ],
)
def test_empty_data_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"source 'fr': {message}"):
        prepare_one(config_of(tmp_path / "cache", tmp_path / "f.jsonl"))
    assert leftovers(tmp_path / "cache") == []


def test_a_line_of_a_megabyte_is_a_good_one(tmp_path: Path) -> None:
    text = "Une très longue ligne sans fin. " * 33_000
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": text}))
    source = prepare_one(config_of(tmp_path / "cache", tmp_path / "f.jsonl.gz"))
    assert (source.documents, source.split) == (1, 1)
    assert source.targets == len(TOKENIZER.encode(text)) + 1


def test_chats_keep_their_weights(tmp_path: Path) -> None:
    config = config_of(tmp_path, SAMPLES / "sft" / "dialogue.val.jsonl.gz", examples="chat", template="v1")
    source = prepare_one(config, seq_len=256)
    rows = [source.format.decode(record) for record in records_of(source)]
    learned = [int(t) for r in rows for t, w in zip(r.targets, r.weights, strict=True) if w]
    expected: Counter[int] = Counter()
    for line in gzip.decompress((SAMPLES / "sft" / "dialogue.val.jsonl.gz").read_bytes()).splitlines():
        for message in json.loads(line)["messages"]:
            if message["role"] == "assistant":
                expected.update([*TOKENIZER.encode(message["content"]), TOKENIZER.eos_id])
    assert (source.truncated, source.dropped) == (0, 0)
    assert Counter(learned) == expected
    assert source.targets == len(learned)


def test_chats_without_anything_to_learn_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps({"prompt": "a " * 100, "completion": "b"}))
    with pytest.raises(ValueError, match="which has 1 without an answer to learn records"):
        prepare_one(config_of(tmp_path / "cache", tmp_path / "f.jsonl", examples="chat"))


@pytest.mark.parametrize("name", ["rows-00000-of-00001.sizes", "sizes.npy"])
def test_a_full_disk_is_one_where_sizes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """numpy's own writers make of it an error without its number, and a map of the file a signal that kills."""
    original = pack.pack_bucket

    def fill(job: Any) -> Any:
        (job.directory / name).symlink_to("/dev/full")
        return original(job)

    monkeypatch.setattr(pack, "pack_bucket", fill)
    with pytest.raises(OSError) as raised:
        prepare_one(config_of(tmp_path))
    assert failure_of(raised.value).exit_code == ExitCode.STORAGE
