"""Random reading of rows through a bounded pool of open shards."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mixtral_jax.data.loader import RowReader
from mixtral_jax.data.prepare.cache import PreparedSource
from mixtral_jax.data.rows import WRITER_OPTIONS, Batch, RowFormat

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 8


def shards_of(directory: Path, shards: int, rows: int) -> PreparedSource:
    """A source of so many shards; the first token of row r is r."""
    directory.mkdir(parents=True, exist_ok=True)
    row_format, files = RowFormat(SEQ_LEN, "uint32", False), []
    for shard in range(shards):
        path = directory / f"rows-{shard:05d}-of-{shards:05d}.array_record"
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for row in range(shard * rows, (shard + 1) * rows):
            writer.write(row_format.encode(np.array([SEQ_LEN + 1]), np.arange(row, row + SEQ_LEN + 1), None))
        writer.close()
        files.append((path.name, rows, path.stat().st_size))
    return PreparedSource(
        name="s", fingerprint="f" * 64, directory=str(directory), format=row_format, shards=tuple(files),
        documents=1, tokens=1, targets=1,
    )  # fmt: skip


def first_token(reader: RowReader, row: int) -> int:
    found = reader.read(0, row)
    assert isinstance(found, Batch)
    return int(found.tokens[0])


_PROGRAM = """
import os, random, resource, sys, threading
from mixtral_jax.data.loader import RowReader
from mixtral_jax.data.prepare.cache import PreparedSource
from array_record.python import array_record_data_source
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
source = PreparedSource.model_validate_json(sys.argv[1])
reader, wrong, most = RowReader([source]), [], 0
def read(seed):
    chosen = random.Random(seed)
    for _ in range(600):
        row = chosen.randrange(source.rows)
        if int(reader.read(0, row).tokens[0]) != row:
            wrong.append(row)
threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
[t.start() for t in threads]
while any(t.is_alive() for t in threads):
    most = max(most, len(os.listdir("/proc/self/fd")))
[t.join() for t in threads]
reader.close()
print(len(wrong), most < 64, len(os.listdir("/proc/self/task")))
"""


def test_at_64_descriptors_300_shards_are_read_at_random(tmp_path: Path) -> None:
    source = shards_of(tmp_path / "rows", 300, 3)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, source.model_dump_json()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    wrong, bounded, threads = done.stdout.split()
    assert (wrong, bounded) == ("0", "True")
    assert int(threads) < 100  # the library's pool of 64 for the whole process, not for a shard


def test_the_pool_closes_what_was_read_longest_ago_and_nothing_that_is_read(tmp_path: Path, monkeypatch) -> None:
    from mixtral_jax.data import reader as reading

    monkeypatch.setattr(reading, "_bound", lambda: 2)
    source, pool = shards_of(tmp_path, 5, 2), reading.ShardPool()
    for path in source.paths:
        pool.read(path, 1)
    assert list(pool._shards) == source.paths[-2:]
    pool.read(source.paths[3], 0)
    pool.read(source.paths[0], 0)
    assert list(pool._shards) == [source.paths[3], source.paths[0]]
    held = [pool._hold(path) for path in source.paths[1:3]]
    pool.read(source.paths[3], 0)
    pool.close(source.paths)
    assert list(pool._shards) == source.paths[1:3]
    for shard in held:
        shard.users -= 1
    pool.close(source.paths)
    assert len(pool) == 0


def test_threads_read_the_right_rows_through_a_pool_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtral_jax.data import reader as reading

    source = shards_of(tmp_path, 7, 3)
    monkeypatch.setattr(reading, "_bound", lambda: 1)
    monkeypatch.setattr(reading, "_pool", reading.ShardPool())
    reader, wrong = RowReader([source]), []

    def read(seed: int) -> None:
        order = np.random.default_rng(seed).integers(0, source.rows, 300).tolist()
        wrong.extend(row for row in order if first_token(reader, row) != row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert wrong == []
    assert len(reading._pool) == 0


def test_a_reader_that_nobody_holds_closes_its_shards(tmp_path: Path) -> None:
    source = shards_of(tmp_path / "rows", 3, 1)
    before = len(os.listdir("/proc/self/fd"))
    reader = RowReader([source])
    assert [first_token(reader, row) for row in range(3)] == [0, 1, 2]
    assert len(os.listdir("/proc/self/fd")) > before
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("damage", ["gone", "overwritten"])
def test_a_shard_that_is_damaged_is_named_in_a_sentence(tmp_path: Path, damage: str) -> None:
    from mixtral_jax.train.errors import ExitCode, failure_of

    source = shards_of(tmp_path / "rows", 2, 4)
    path = Path(source.paths[1])
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(os.urandom(path.stat().st_size))
    reader = RowReader([source])
    assert first_token(reader, 3) == 3
    with pytest.raises(OSError, match="is damaged, or there no more") as raised:
        reader.read(0, 4)
    failure = failure_of(raised.value)
    assert failure.exit_code == ExitCode.STORAGE
    assert str(path) in failure.reason and "data cache rm" in failure.reason
