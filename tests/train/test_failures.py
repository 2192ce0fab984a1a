"""Whatever fails, wherever: the exit code, STATUS and one sentence say what it was, and the checkpoints stand.

One compiled run serves all: a failure ends one step of it, and the next one goes on.
"""

import errno
import json
import os

import pytest

import mixtral_jax as mj
from mixtral_jax import launch
from mixtral_jax.checkpoint import trees
from mixtral_jax.data.prepare import cache
from mixtral_jax.train import build
from mixtral_jax.train import trainer as training
from mixtral_jax.train.checkpoints import checkpointer, patience
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import TABLE, ExitCode, StorageError, UserError, explain, failure_of
from mixtral_jax.train.feed import Feed
from mixtral_jax.train.hooks import Evaluate
from mixtral_jax.train.hooks.sinks import JsonLines
from mixtral_jax.train.run import failures_reported
from mixtral_jax.train.run.directory import RunDirectory
from tests.tiny import write_run_file

SYSTEM = ("ENOSPC", "EDQUOT", "EIO", "EPERM", "ENOENT", "EPIPE")
STORAGE = ("ENOSPC", "EDQUOT", "EIO")
EVERY = (*SYSTEM, "MemoryError", "killed child")


def made(name):
    if name == "MemoryError":
        return MemoryError("Unable to allocate 3 TiB")
    if name == "killed child":
        return ChildProcessError(errno.ECHILD, "a worker was ended by SIGKILL")
    code = getattr(errno, name)
    return OSError(code, os.strerror(code), "some/file")


def said(name):
    return {"MemoryError": "Unable to allocate 3 TiB", "killed child": "a worker was ended by SIGKILL"}.get(
        name
    ) or os.strerror(getattr(errno, name))


def before_the_run(name, what=""):
    """What a user names is the user's; a disk is the disk's; memory, children and pipes are neither's."""
    if what == "read_item":  # of the run's own checkpoints: whose name nobody mistyped
        return 2 if name == "ENOENT" else 74 if name in SYSTEM else 1
    return 74 if name in STORAGE else 2 if name in ("EPERM", "ENOENT") else 1


def in_the_run(name):
    """What was there a step ago is storage that has failed."""
    return 74 if name in (*STORAGE, "EPERM", "ENOENT") else 1


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(patience, "PAUSES", (0.001, 0.001, 0.001))
    monkeypatch.setattr(checkpointer, "PAUSES", (0.001, 0.001, 0.001))


def raising(name):
    def fail(*_, **__):
        raise made(name)

    return fail


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_run_file(
        tmp_path_factory.mktemp("failures"), steps=60, eval={"every": 1, "batches": 1},
        log={"every": 1}, checkpoint={"every": 1, "keep_last": 99, "asynchronous": False},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trainer(file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: None)
        with mj.Trainer(load_config(file).config, quiet=True) as trainer:
            next(trainer.steps())
            yield trainer


def whole(trainer):
    place = trainer.run.checkpoints
    return {step for step in checkpointer.saved_steps(place) if trees.damage(place / str(step)) is None}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("phase", "place", "method"),
    [
        ("step", Feed, "__next__"),
        ("log", JsonLines, "write"),
        ("eval", Evaluate, "measure"),
        ("save", checkpointer.checkpoint, "save_async"),
    ],
)
def test_in_a_step(trainer, phase, place, method, name, monkeypatch, capsys):
    stood = whole(trainer)
    monkeypatch.setattr(place, method, raising(name))
    with pytest.raises(Exception) as caught, failures_reported(trainer.run):
        for _ in range(2):  # what cannot be read ahead is missed behind its step
            next(trainer.steps())
    monkeypatch.undo()
    code = 74 if phase == "save" and name in SYSTEM else in_the_run(name)
    status = json.loads((trainer.run.path / "STATUS").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", trainer.step, code)
    assert explain(caught.value) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"exit {code}: ") and said(name) in last and said(name) in status["reason"]
    saved = whole(trainer)
    assert stood <= saved
    if code == 74:
        assert f"checkpoint {max(saved)} stands" in last and "run the same command again" in last
        assert (trainer.step in saved) == (phase != "save")  # what could be saved is


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("place", "what"),
    [(build, "prepare"), (build, "first_screen"), (RunDirectory, "create"), (checkpointer.checkpoint, "read_item")],
)
def test_before_a_step(trainer, file, place, what, name, monkeypatch, capsys):
    """What the run had stays as it was: a refused attempt leaves even its STATUS alone."""
    status = trainer.run.path / "STATUS"
    status.write_text('{"state": "done", "step": 7, "reason": "", "exit_code": 0}')
    stood = whole(trainer)
    monkeypatch.setattr(training, "make_mesh", lambda config: None)
    monkeypatch.setattr(place, what, raising(name))
    code = launch.main(["pretrain", str(file)])
    assert code == before_the_run(name, what)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"exit {code}: " if code != 2 else "error: ")
    assert said(name) in last or (what, name) == ("read_item", "ENOENT")  # then it is the checkpoint that is not whole
    now = json.loads(status.read_text())
    if code == 2:
        assert now["state"] == "done"
    else:
        assert (now["state"], now["step"], now["exit_code"]) == ("failed", 7, code) and said(name) in now["reason"]
    assert whole(trainer) == stood


def test_a_full_disk_without_a_run_leaves_nothing_half(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.os, "fsync", raising("ENOSPC"))
    with pytest.raises(OSError, match="No space left"):
        cache.write_atomically(tmp_path / "STATUS", "text")
    assert not list(tmp_path.iterdir())


def test_status_says_that_the_disk_is_full(tmp_path, monkeypatch):
    place = RunDirectory(tmp_path)
    place.write_status("running", 3, "and a long sentence that is gone afterwards, to its last word", None)
    place.step = 5
    monkeypatch.setattr(cache.os, "fsync", raising("ENOSPC"))
    place.write_failure("full", 74)
    said = json.loads((tmp_path / "STATUS").read_text())
    assert (said["state"], said["step"], said["reason"], said["exit_code"]) == ("failed", 5, "full", 74)


@pytest.mark.parametrize("name", ["EIO", "EPERM", "MemoryError"])
def test_what_cannot_be_read_is_no_broken_checkpoint(trainer, name, monkeypatch):
    """An older one, or none, must not take its place."""
    monkeypatch.setattr(checkpointer.checkpoint, "read_item", raising(name))
    with pytest.raises(type(made(name))):
        checkpointer.find(trainer._checkpoints, "auto", print)


def reported_by_a_library(*_, **__):
    raise ValueError(f"INTERNAL: Error reading chunk: {os.strerror(errno.EIO)} [source locations='...']")


def test_a_disk_that_does_not_answer_while_arrays_are_read(trainer, monkeypatch):
    """tensorstore reports it as a ValueError, as it does another shape."""
    found = checkpointer.find(trainer._checkpoints, "auto", print)
    monkeypatch.setattr(checkpointer.checkpoint, "restore", reported_by_a_library)
    with pytest.raises(ValueError) as caught:
        checkpointer.restore_state(found, trainer._state)
    assert failure_of(caught.value).exit_code == ExitCode.STORAGE


@pytest.mark.parametrize("name", EVERY[:-1])
def test_in_an_export(trainer, name, tmp_path, monkeypatch, capsys):
    newest = trainer.run.checkpoints / str(max(whole(trainer)))
    monkeypatch.setattr("mixtral_jax.convert.atomic.os.fsync", raising(name))
    code = launch.main(["convert", "orbax2hf", str(newest), str(tmp_path / "hf")])
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == before_the_run(name) and said(name) in last
    assert not list(tmp_path.iterdir()) and trees.damage(newest) is None


def test_the_table_has_a_code_for_every_kind():
    assert {code for code, _ in TABLE.values()} == {ExitCode.USAGE, ExitCode.STORAGE, ExitCode.UNEXPECTED}
    assert failure_of(StorageError("x")).exit_code == 74 and failure_of(UserError("x")).exit_code == 2
    assert failure_of(OSError(errno.EBADF, "x")).sentence == ""  # ours, with a traceback
    assert failure_of(ValueError("INTERNAL: write: No space left on device [x]")).exit_code == 74  # tensorstore's
    of_array_record = RuntimeError("write() failed: No space left on device; at byte 0")
    assert failure_of(of_array_record).exit_code == 74
    assert failure_of(ValueError("line 3: 'No space left on device' is no role")).exit_code != 74  # quotes a record
    gloo = type("JaxRuntimeError", (RuntimeError,), {})("UNKNOWN: Gloo connect: Connection timed out")
    assert failure_of(gloo).sentence == ""  # no disk: peers.py knows
    device = type("JaxRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    assert failure_of(device).exit_code == 1 and "9 bytes" in failure_of(device).sentence


def test_too_few_descriptors_is_a_sentence_and_no_traceback():
    failure = failure_of(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "cache/locks/a"))
    assert failure.exit_code == ExitCode.USAGE
    assert failure.sentence == "cache/locks/a: Too many open files; allow more of them (ulimit -n)"
