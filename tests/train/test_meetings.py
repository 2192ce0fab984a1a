"""What processes do together, with two of them as threads of this one, each with a cache of its own or a common one."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mixtral_jax.train import build, meetings
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.preference import references

COUNT = 2


class Together:
    """Two threads that jax takes for processes 0 and 1; a meeting that one of them does not come to is an error."""

    def __init__(self, monkeypatch):
        self.me, self.barrier, self.table = threading.local(), threading.Barrier(COUNT, timeout=20), [None] * COUNT
        self.met = [[], []]
        monkeypatch.setattr(jax, "process_count", lambda: COUNT)
        monkeypatch.setattr(jax, "process_index", lambda: getattr(self.me, "index", 0))
        monkeypatch.setattr(meetings, "meet", self.meet)
        monkeypatch.setattr(references, "meet", self.meet)
        monkeypatch.setattr(meetings.multihost_utils, "process_allgather", self.allgather)
        monkeypatch.setattr(meetings.multihost_utils, "broadcast_one_to_all", self.broadcast)

    def meet(self, what):
        self.met[self.me.index].append(what)
        self.barrier.wait()

    def allgather(self, values, tiled=False):
        if tiled:  # an answer of all devices, which all have already
            return values
        self.table[self.me.index] = values
        self.barrier.wait()
        found = np.stack(self.table)
        self.barrier.wait()
        return found

    def broadcast(self, values, is_source):
        everything, sources = self.allgather(values), self.allgather(np.array(is_source))
        assert sources.sum() == 1
        return everything[sources.argmax()]

    def run(self, work):
        """What work(0) and work(1) give, or the exception of each."""
        results = [None] * COUNT

        def one(index):
            self.me.index = index
            try:
                results[index] = work(index)
            except Exception as error:
                results[index] = error
                if not isinstance(error, UserError):  # which both raise
                    self.barrier.abort()

        threads = [threading.Thread(target=one, args=(i,)) for i in range(COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.met[0] == self.met[1]
        return results


@pytest.fixture
def together(monkeypatch):
    return Together(monkeypatch)


def test_who_sees_a_directory(together, tmp_path):
    assert together.run(lambda i: meetings.sharers(tmp_path / "one").tolist()) == [[True, True]] * 2
    assert together.run(lambda i: meetings.sharers(tmp_path / str(i)).tolist()) == [[True, False]] * 2
    assert together.run(lambda i: meetings.sharers("gs://bucket/run").tolist()) == [[True, True]] * 2
    assert not list(tmp_path.rglob(".seen*"))


def test_a_directory_that_was_missing_until_now_is_seen(together, tmp_path, monkeypatch):
    """NFS keeps a "no" for up to 30 s: only who makes what is missing asks the server again."""
    asked, mkdir, exists = set(), Path.mkdir, os.path.exists

    def make(self, *args, **kwargs):
        asked.add(jax.process_index())
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", lambda *a, **k: make(Path(a[0]), parents=True, exist_ok=True))
    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(os.path, "exists", lambda path: jax.process_index() in asked and exists(path))
    assert together.run(lambda i: meetings.sharers(tmp_path / "run" / "new").tolist()) == [[True, True]] * 2


def test_where_nothing_can_be_written_everything_is_there(together, tmp_path):
    """Rows that are mounted read only; checkpoints must be written."""
    (tmp_path / "file").touch()

    def enter(index):
        with meetings.first_alone(tmp_path / "file" / "cache"):
            return index

    assert together.run(enter) == [0, 1]
    with pytest.raises(OSError):
        meetings.sharers(tmp_path / "file" / "cache")


def test_a_directory_that_must_be_shared(together, tmp_path):
    assert together.run(lambda i: meetings.check_shared("checkpoint.directory", tmp_path / "one")) == [None, None]
    for error in together.run(lambda i: meetings.check_shared("checkpoint.directory", tmp_path / str(i))):
        assert isinstance(error, UserError)
        assert "is not one directory for all processes: process 1 does not see what process 0 writes" in str(error)


@pytest.mark.parametrize("shared", [True, False])
def test_one_process_makes_what_all_share_and_each_makes_its_own(shared, together, tmp_path):
    made = []

    def work(index):
        place = tmp_path / ("cache" if shared else str(index))
        with meetings.first_alone(place):
            if not (place / "rows").exists():
                made.append(index)
                (place / "rows").parent.mkdir(exist_ok=True)
                (place / "rows").touch()

    assert together.run(work) == [None, None]
    assert sorted(made) == ([0] if shared else [0, 1])


class Rows:
    """A source of 5 micro-batches of 2 rows, in parts of 2 micro-batches; its numbers are those of the rows."""

    name, fingerprint, rows, format = "pairs", "f", 10, SimpleNamespace(pairs=1)

    def __init__(self, monkeypatch):
        self.asked = [[], []]
        monkeypatch.setattr(references, "PART_BATCHES", 2)
        monkeypatch.setattr(references, "EvalSource", lambda *_: SimpleNamespace(batch=lambda number: number))

    def ask(self, number):
        self.asked[jax.process_index()].append(number)
        numbers = np.arange(2 * number, 2 * number + 2, dtype=np.float32)
        return SimpleNamespace(ref_logps=np.stack([numbers, -numbers], -1)[None, :, None])

    def numbers(self, place):
        return references.precomputed([self], self.ask, {"weights": "w"}, str(place), 2, (0, 1), lambda line: None)["f"]


def parts(place):
    return {int(file.name[5:10]): file for file in Path(place).rglob("part-*.npy")}


@pytest.mark.parametrize("layout", ["shared", "own", "own and lost", "own and damaged"])
def test_what_is_missing_is_agreed_and_what_one_has_is_told(layout, together, tmp_path, monkeypatch):
    """However parts are lost on either side: the same numbers, nothing computed that anybody has, nothing waits."""
    rows = Rows(monkeypatch)
    place = lambda i: tmp_path / ("cache" if layout == "shared" else str(i))  # noqa: E731 - short
    expected = np.stack([np.arange(10), -np.arange(10)], -1)[:, None].astype(np.float32)
    for numbers in together.run(lambda i: rows.numbers(place(i))):
        np.testing.assert_array_equal(numbers, expected)
    assert rows.asked == [[0, 1, 2, 3, 4]] * 2
    assert all(sorted(parts(place(i))) == [0, 1, 2] for i in range(2))  # what process 0 writes, or each its own
    if layout == "own and lost":
        parts(place(0))[0].unlink()
        parts(place(1))[1].unlink()
        parts(place(0))[2].unlink()
        parts(place(1))[2].unlink()
    if layout == "own and damaged":
        for file, size in ((parts(place(0))[0], 0), (parts(place(1))[2], 130), (parts(place(0))[2], 40)):
            file.write_bytes(file.read_bytes()[:size])
    for numbers in together.run(lambda i: rows.numbers(place(i))):
        np.testing.assert_array_equal(numbers, expected)
    assert rows.asked == [[0, 1, 2, 3, 4] + [4] * layout.startswith("own and")] * 2
    rows.asked = [[], []]
    for numbers in together.run(lambda i: rows.numbers(place(i))):
        np.testing.assert_array_equal(numbers, expected)
    assert rows.asked == [[], []]  # and what was lost is there again


def test_one_process_keeps_what_it_computes(tmp_path, monkeypatch):
    rows = Rows(monkeypatch)
    first, again = rows.numbers(tmp_path), rows.numbers(tmp_path)
    np.testing.assert_array_equal(first, again)
    assert rows.asked[0] == [0, 1, 2, 3, 4]


def test_processes_of_another_configuration_do_nothing_together(together, make_config):
    configs = [make_config(steps=8), make_config(steps=None, data={"epochs": 1})]
    for error in together.run(lambda i: build.settle_steps(configs[i])):
        assert isinstance(error, UserError) and "differ in configuration" in str(error)
