"""When saves are made, refused, made again, and given up; what a full or silent storage cannot take away."""

import errno
import os
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from mixtral_jax.checkpoint import trees
from mixtral_jax.train import meetings
from mixtral_jax.train.checkpoints import checkpointer as checkpoint
from mixtral_jax.train.checkpoints import patience, together
from mixtral_jax.train.checkpoints.best import Best, EarlyStoppingConfig
from mixtral_jax.train.checkpoints.checkpointer import CheckpointConfig, Checkpointer, find_together, saved_steps
from mixtral_jax.train.errors import ExitCode, StorageError, failure_of, is_of_storage
from mixtral_jax.train.hooks import Checkpoint, Moment, Writer
from mixtral_jax.train.hooks import checkpoint as hook_of_saves

STATE = {"w": jnp.ones(3)}


class Run:
    """The hook as the loop calls it, with steps that last until the save under way has ended."""

    def __init__(self, place, best=None, **config):
        self.said, self.best = [], Best(None) if best is None else best
        self.checkpointer = Checkpointer(CheckpointConfig(**config), place)
        self.hook = Checkpoint(
            self.checkpointer, Writer(None), SimpleNamespace(say=self.said.append), self.items, self.best
        )

    def items(self, moment):
        return {"next_row": 10 * moment.step}, {"step": moment.step}

    def step(self, step, last=False, wait=True):
        moment = Moment(step, STATE, None, 0, last)
        if self.hook.due(step, last):
            self.hook.run(moment)
        if wait and self.checkpointer._under_way is not None:
            self.checkpointer._under_way._future.exception()


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    for module in (patience, checkpoint):
        monkeypatch.setattr(module, "PAUSES", (0.001, 0.001, 0.001))


@pytest.fixture
def refuse(monkeypatch):
    """refuse(code, steps): the file system refuses these in the background; returns the attempts."""
    attempts, original = [], trees.PendingSave.result

    def refuse(error, *steps):
        def result(self):
            attempts.append(int(self._path.name))
            original(self)
            if attempts[-1] in steps:
                self._path.rmtree()
                raise error
            return 1

        monkeypatch.setattr(trees.PendingSave, "result", result)
        return attempts

    return refuse


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_refused_save_is_seen_at_the_next_step_and_made_again(tmp_path, refuse):
    """It was seen at the next save only, which was then not made."""
    attempts, run = refuse(full(), 3, 5), Run(tmp_path, every=3)
    for step in range(1, 9):
        run.step(step)
        time.sleep(0.002)
    assert saved_steps(tmp_path) == [6] and attempts == [3, 5, 6]  # 5: after a pause; 6: due by itself
    refusals = [line for line in run.said if "could not be written" in line]
    assert len(refusals) == 2 and "No space left on device; there is no checkpoint; it is made again in" in refusals[0]
    assert trees.read_item(tmp_path / "6", "dataset") == {"next_row": 60}


def test_a_save_that_has_ended_is_reported_at_the_next_step(tmp_path):
    run = Run(tmp_path, every=3)
    for step in range(1, 5):
        run.step(step)
    assert [line.partition(":")[0] for line in run.said] == ["checkpoint 3"]
    assert not run.hook.due(5, last=False)


def test_after_three_more_attempts_the_run_ends_with_74_and_what_stood_stands(tmp_path, refuse):
    Run(tmp_path, every=2).step(2)
    attempts, run = refuse(full(), *range(3, 99)), Run(tmp_path, every=2)
    with pytest.raises(StorageError, match="No space left on device; checkpoint 2 stands: make room and run") as caught:
        for step in range(3, 99):
            run.step(step)
            time.sleep(0.002)
    assert len(attempts) == 4 and failure_of(caught.value).exit_code == ExitCode.STORAGE
    assert saved_steps(tmp_path) == [2]


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file"), PermissionError(errno.EACCES, "Permission denied"),
     OSError("503 Service Unavailable"), ValueError("UNAVAILABLE: HTTP 503 [source locations='...']")],
)  # fmt: skip
def test_no_refusal_of_a_save_is_the_users_mistake(tmp_path, refuse, error):
    refuse(error, *range(1, 99))
    with pytest.raises(StorageError) as caught:
        Run(tmp_path, every=1).hook.save(Moment(1, STATE, None, 0, False))
    assert failure_of(caught.value).exit_code == ExitCode.STORAGE


@pytest.mark.parametrize("refused", [(4,), (3, 4)])
def test_a_best_evaluation_whose_save_was_refused_is_not_named(tmp_path, refuse, refused):
    best = Best(EarlyStoppingConfig(patience=None))
    refuse(full(), *refused)
    run = Run(tmp_path, best, every=None, keep_last=1)
    for step, loss in enumerate((9, 5, 8 if refused == (4,) else 4, 2, 8, 8, 8), 1):
        best.judge(step, {"eval/loss": float(loss)})
        run.step(step)
        time.sleep(0.002)
    assert saved_steps(tmp_path) == [2, 6] and checkpoint.best_step(tmp_path) == 2
    assert best.step == 2 and "5.0000, is that of checkpoint 2 (2.0000 " in str(best)
    run.hook.save(Moment(7, STATE, None, 0, False))
    assert saved_steps(tmp_path) == [2, 7]


@pytest.mark.parametrize(
    "error",
    [ValueError("shapes differ"), RecursionError("shapes differ"),
     AttributeError("shapes differ"), type("OptaxError", (Exception,), {"__module__": "optax.x"})("shapes differ")],
)  # fmt: skip
def test_a_bug_is_no_refusal(tmp_path, refuse, error):
    attempts = refuse(error, *range(1, 99))
    with pytest.raises(type(error), match="shapes differ"):
        Run(tmp_path, every=1).hook.save(Moment(1, STATE, None, 0, False))
    assert attempts == [1]


def test_an_array_that_is_gone_is_no_refusal():
    array = jnp.ones(2)
    array.delete()
    with pytest.raises(RuntimeError) as caught:
        array + 1
    assert type(caught.value) is RuntimeError and not is_of_storage(caught.value)


def lose_twice(monkeypatch):
    """The first two saves are refused when they are all but done."""
    remaining, original = [True, True], trees.PendingSave.result

    def result(self):
        original(self)
        if remaining and remaining.pop():
            self._path.rmtree()
            raise full()
        return 1

    monkeypatch.setattr(trees.PendingSave, "result", result)


def test_the_last_save_is_waited_for_and_made_again(tmp_path, refuse, monkeypatch):
    lose_twice(monkeypatch)
    run = Run(tmp_path, every=None)
    run.hook.save(Moment(7, STATE, None, 0, False))
    assert saved_steps(tmp_path) == [7] and len(run.said) == 3


def test_one_that_the_steps_wait_for_is_made_again_by_several_too(tmp_path, monkeypatch):
    """It was waited for where it is begun, and of several no process may begin again alone."""
    lose_twice(monkeypatch)
    monkeypatch.setattr(hook_of_saves, "jax", SimpleNamespace(process_count=lambda: 2))
    run = Run(tmp_path, every=3, asynchronous=False)
    run.step(3)
    assert saved_steps(tmp_path) == [3] and len(run.said) == 3


@pytest.mark.parametrize("error", [type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("503"), full()])
def test_storage_that_does_not_say_what_stands_ends_no_attempt(tmp_path, refuse, monkeypatch, error):
    """Buckets have errors of their own, and this one came while another was handled."""

    def silent(directory):
        raise error

    refuse(full(), 3)
    monkeypatch.setattr(checkpoint, "saved_steps", silent)
    run = Run(tmp_path, every=3)
    run.step(3)
    run.step(4)
    assert "which checkpoints stand cannot be seen" in run.said[0] and "it is made again in" in run.said[0]


def test_what_is_still_to_be_made_again_at_the_end_is_told(tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES", (99.0,))
    refuse(full(), 2)
    run = Run(tmp_path, every=2)
    run.step(2)
    run.step(3)
    with pytest.raises(StorageError, match="No space left on device"):
        run.hook.finish()
    assert run.checkpointer._pending.left_behind
    run.step(4)
    run.step(5)
    run.hook.finish()


def test_what_was_refused_behind_its_commit_is_whole_and_not_written_over(tmp_path, monkeypatch):
    def listing(path):
        raise OSError(errno.EIO, "Input/output error")

    run = Run(tmp_path, every=None)
    monkeypatch.setattr(trees, "list_files", listing)
    monkeypatch.setattr(checkpoint, "remove", lambda path: removed.append(path.name))
    removed = []
    run.hook.save(Moment(7, STATE, None, 0, False))
    run.hook.finish()
    assert removed == ["7"] and saved_steps(tmp_path) == [7]  # before the first attempt alone


def test_nothing_is_deleted_before_the_new_one_is_whole(tmp_path, refuse):
    Run(tmp_path, every=1, keep_last=1).step(1)
    refuse(full(), 2)
    run = Run(tmp_path, every=2, keep_last=1)
    run.step(2)
    assert saved_steps(tmp_path) == [1]
    run.step(4)
    assert saved_steps(tmp_path) == [4]


def test_a_checkpoint_that_cannot_be_removed_is_no_failed_save(tmp_path, monkeypatch):
    Run(tmp_path, every=1, keep_last=1).step(1)
    run = Run(tmp_path, every=1, keep_last=1)

    def remove(path):
        if path.name == "1":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "remove", remove)
    run.step(2)
    run.step(3)
    assert "older checkpoints could not be removed: Input/output error" in run.said[0]
    assert saved_steps(tmp_path) == [1, 2, 3]


def test_minutes_count_beside_steps(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    saver = Checkpointer(CheckpointConfig(every=10, every_minutes=2), tmp_path)
    made = []
    for step in range(1, 25):
        if saver.due(step, last=False):
            made.append(step)
            saver.save(STATE, step, {}, {})
            saver.wait()
        now[0] += 30
    assert made == [5, 9, 10, 14, 18, 20, 24]


@pytest.mark.parametrize(
    "error",
    [OSError("503 Service Unavailable"), OSError(errno.ESTALE, "Stale file handle"),
     PermissionError(errno.EACCES, "Permission denied"), RuntimeError("503")],
)  # fmt: skip
def test_an_older_checkpoint_takes_no_place_of_one_that_cannot_be_read(tmp_path, monkeypatch, error):
    for step in (1, 2):
        Run(tmp_path, every=1).step(step)
    asked, original = [], trees.read_item

    def read(path, name):
        asked.append(path.name)
        if path.name == "2" and len(asked) < limit:
            raise error
        return original(path, name)

    monkeypatch.setattr(checkpoint.checkpoint, "read_item", read)
    limit, said = 3, []
    found = find_together(tmp_path, "auto", said.append)
    assert found is not None and found.step == 2 and len(said) == 2 and "trying again in" in said[0]
    limit = 99
    with pytest.raises(StorageError, match="could not be read: ") as caught:
        find_together(tmp_path, "auto", said.append)
    assert failure_of(caught.value).exit_code == ExitCode.STORAGE and saved_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("name", ["commit_success.txt", "2", ""])
def test_a_name_that_does_not_answer_is_not_missing(tmp_path, monkeypatch, name):
    """os.path.exists says no to every error: the commit file was `missing`, or there was no checkpoint at all."""
    for step in (1, 2):
        Run(tmp_path, every=1).step(step)
    stat, silent = os.stat, os.path.join(tmp_path, {"commit_success.txt": f"2/{name}"}.get(name, name)).rstrip("/")

    def stale(path, *args, **kwargs):
        if not isinstance(path, int) and os.fspath(path) == silent:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(StorageError, match="Stale file handle"):
        find_together(tmp_path, "auto", print)


def test_improvements_are_saved_once_in_every_many_steps_beside_the_others():
    """They were saved at every evaluation, for as long as a run gets better at each."""
    config = EarlyStoppingConfig(patience=None)
    best, saved = Best(config, every=10), []
    for step in range(2, 41, 2):
        best.judge(step, {"eval/loss": 100.0 - step}, saved=step == 39)
        saved += [step] * (best.step == step)
    assert saved == [2, 10, 20, 30, 40]
    best.judge(44, {"eval/loss": 1.0})
    assert best.step == 40 and "(1.0000 was not saved)" in str(best)
    best.judge(46, {"eval/loss": 0.5}, saved=True)
    assert best.step == 46 and "not saved" not in str(best)


class Store:
    """A key-value store as jax's coordination service has it, for threads."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def key_value_delete(self, key):
        self.values.pop(key, None)

    def key_value_dir_get(self, place):
        return [(key, value) for key, value in self.values.items() if key.startswith(place)]

    def blocking_key_value_get(self, key, milliseconds):
        return self.values[key]


@pytest.fixture
def process(monkeypatch):
    """process(i): from here on this is process i of three; each counts its words anew."""
    store = Store()
    for module in (meetings, together):
        monkeypatch.setattr(module, "store", lambda: store)
    monkeypatch.setattr(together.jax, "process_count", lambda: 3)
    monkeypatch.setattr(together.Together, "left_behind", False)  # and so it is again behind the test

    def process(index):
        monkeypatch.setattr(together.jax, "process_index", lambda: index)
        monkeypatch.setattr(meetings, "_words", iter(range(1000)))
        monkeypatch.setattr(together, "_works", iter(range(1000)))

    process.store = store
    return process


def test_what_process_0_says_the_others_hear(process):
    process(0)
    assert [meetings.told(lambda word=word: word) for word in ("save", "")] == ["save", ""]
    process(2)
    assert [meetings.told(lambda: "something else") for _ in range(2)] == ["save", ""]


def done(work):
    part = together.Together(work)
    while not part._future.done():
        time.sleep(0.001)
    return part


def fail():
    raise OSError(errno.EIO, "Input/output error")


def test_where_one_of_several_cannot_save_none_has_saved(process):
    parts = []
    for index, work in ((1, fail), (2, lambda: "whole"), (0, lambda: "whole")):
        process(index)
        parts.append(done(work))
    assert parts[2].ended()
    with pytest.raises(OSError, match=r"process 1: .*Input/output error"):
        parts[2].result()
    for index, part in ((1, parts[0]), (2, parts[1])):
        process(index)
        with pytest.raises(OSError, match="Input/output error"):
            part.result()


def test_where_all_have_done_their_part_it_is_done(process):
    parts = {}
    for index in (0, 1, 2):
        process(index)
        parts[index] = done(lambda: "whole")
        assert parts[0].ended() == (index == 2)
    for index, part in parts.items():
        process(index)
        assert part.result() == "whole"
