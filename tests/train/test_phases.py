"""What a run is doing: who counts the time, who says it in STATUS, who ends it where nothing moves."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from mixtral_jax.checkpoint import trees
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.attempts import add_up, read_attempts
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.hooks.watchdog import PhaseSeconds, Watchdog, limits_of
from mixtral_jax.train.phases import Phase, Phases
from mixtral_jax.train.run import directory, heartbeat
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.goodput import Goodput
from tests.tiny import metrics_of, write_run_file


def test_time_counts_for_the_innermost_phase_and_adds_up_to_all_of_it():
    phases = Phases(time.monotonic() - 5.0)
    phases.become(Phase.BETWEEN)
    with phases.during(Phase.STEP), phases.during(Phase.EVALUATING):
        time.sleep(0.05)
        assert phases.now is Phase.EVALUATING and phases.read().idle >= 0.05
        phases.beat()
        assert phases.read().idle < 0.05
    assert phases.now is Phase.BETWEEN
    seconds = phases.read().seconds
    assert seconds["start"] >= 5.0 and seconds["evaluation"] >= 0.05 and seconds["step"] < 0.05
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - phases.began, abs=0.05)


def test_a_generator_that_was_left_takes_out_its_own_phase_only():
    phases = Phases()

    def left():
        with phases.during(Phase.STEP):
            yield

    first = left()
    next(first)
    with phases.during(Phase.SAVING):
        first.close()
        assert phases.now is Phase.SAVING
    assert phases.now is Phase.STARTING


def test_a_batch_that_is_waited_for_is_data_wait_and_the_reader_outlives_a_failure():
    phases, seen = Phases(), []

    class Batches:
        def __iter__(self):
            return self

        def __next__(self):
            seen.append(phases.now)
            if len(seen) == 1:
                raise OSError(errno.EIO, "once")
            return len(seen)

    batches = phases.reading(Batches())
    with pytest.raises(OSError, match="once"):
        next(batches)
    assert next(batches) == 2 and set(seen) == {Phase.READING} and phases.read().seconds["data_wait"] > 0


def test_each_phase_has_its_own_limit():
    assert limits_of(None, PhaseSeconds()) == {}
    assert limits_of(None, PhaseSeconds(save=7)) == {"save": 7}
    limits = limits_of(60.0, PhaseSeconds(compile=None, sampling=5))
    assert limits == {
        "step": 60, "prepare": 86400, "restore": 1200, "first_step": 300, "evaluation_batch": 60, "sampling": 5,
        "save": 1200, "last_save": 1200,
    }  # fmt: skip
    assert limits_of(2.0, PhaseSeconds())["compile"] == 120
    assert {phase.limit for phase in Phase} - {""} == {"step", *PhaseSeconds.model_fields}


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase.limit])
def test_the_watchdog_bites_in_every_phase_that_has_a_limit_and_says_which(phase):
    phases, bites, bitten = Phases(), [], threading.Event()

    def bite(reason):
        bites.append(reason)
        bitten.set()

    dog = Watchdog({phase.limit: 0.2}, phases, bite)
    with phases.during(phase):
        for _ in range(10):
            time.sleep(0.05)
            phases.beat()
        assert not bites  # what moves is healthy, however long it takes
        assert bitten.wait(10)
    dog.close()
    key = "log.watchdog_seconds" if phase.limit == "step" else f"log.phase_seconds.{phase.limit}"
    assert f"for 0.2 s ({key})" in bites[0]


@pytest.mark.parametrize("phase", [Phase.COMPILING, Phase.FIRST_STEP, Phase.STEP])
def test_a_batch_that_is_waited_for_has_the_limit_of_what_waits(phase):
    phases = Phases()
    with phases.during(phase), phases.during(Phase.READING):
        assert phases.read().phase is phase and phases.now is Phase.READING


HANGS = """
import os, sys, threading, time
from functools import partial
from pathlib import Path
from mixtral_jax.train.hooks import LogConfig
from mixtral_jax.train.phases import Phase
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.heartbeat import watch
place = RunDirectory(Path(sys.argv[1]))
with watch(place, LogConfig(phase_seconds={"last_save": 0.5})):
    place.begin()
    place.step = 7
    if sys.argv[2] == "deaf":  # so is the disk
        place.write_status = lambda *_: time.sleep(600)
    with place.phases.during(Phase.LAST_SAVE):
        while sys.argv[2] == "unread":  # so is the reader of the output
            os.write(2, b"x" * 4096)
        time.sleep(600)
"""


@pytest.mark.parametrize("disk", ["well", "deaf"])
def test_a_process_that_hangs_ends_with_124(tmp_path, disk):
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path), disk], capture_output=True, timeout=120)
    assert done.returncode == 124
    error = done.stderr.decode()
    reason = "saving: nothing moved for 0.5 s (log.phase_seconds.last_save)"
    assert "Thread" in error and f"exit 124: {reason}" in error  # where every thread stood
    if disk == "well":
        said = json.loads((tmp_path / "STATUS").read_text())
        assert (said["state"], said["step"], said["reason"], said["exit_code"]) == ("watchdog", 7, reason, 124)


@pytest.mark.slow
def test_a_reader_of_the_output_that_hangs_does_not_keep_the_process(tmp_path):
    command = [sys.executable, "-c", HANGS, str(tmp_path), "unread"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=120) == 124
    assert json.loads((tmp_path / "STATUS").read_text())["state"] == "watchdog"


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A trainer of the tiny run on one device."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)
    return lambda *overrides, **changes: loop.Trainer(
        load_config(write_run_file(tmp_path, **changes), overrides).config, quiet=True
    )


def status(trainer):
    return json.loads((trainer.run.path / "STATUS").read_text())


def test_status_says_what_the_run_is_doing(make, monkeypatch):
    seen = {}

    def note(place, name, key):
        method = getattr(place, name)

        def noted(*args, **more):
            seen.setdefault(key, []).append(json.loads((tmp / "STATUS").read_text()))
            return method(*args, **more)

        monkeypatch.setattr(place, name, noted)

    sample = {"every": 8, "prompts": ["the"], "max_new_tokens": 2}
    config = {"eval": {"every": 4}, "checkpoint": {"every": 8, "asynchronous": False}, "sample": sample}
    trainer = make(**config)
    tmp = trainer.run.path
    assert status(trainer)["state"] == "preparing"
    note(loop, "compiled", "compiling")
    note(trees.PendingSave, "result", "saving")
    evaluate = trainer._evaluate._eval_step

    def one_batch(*arguments):
        seen.setdefault("evaluating", []).append(status(trainer))
        return evaluate(*arguments)

    def slow(*arguments, result=trees.PendingSave.result):
        time.sleep(3)
        return result(*arguments)

    monkeypatch.setattr(trainer._evaluate, "_eval_step", one_batch)
    for moment in trainer.steps():
        seen.setdefault("training", []).append(status(trainer))
        assert moment.step < 8 or status(trainer)["state"] == "done"
    seen["training"].pop()
    trainer.close()
    for state in ("compiling", "evaluating", "saving", "training"):
        assert {said["state"] for said in seen[state]} == {state}, state
    said = seen["evaluating"][0]
    assert said["step"] == 4
    assert said["host"] == socket.gethostname() and said["attempt"] == 1 and abs(said["time"] - time.time()) < 600
    assert 0 <= said["seconds_since_progress"] < 60 and said["exit_code"] is None
    ended = status(trainer)
    assert 0 < ended["goodput"] < 1 and {"start", "compile", "step", "evaluation", "save", "sampling"} <= {
        kind for kind, seconds in ended["seconds"].items() if seconds > 0
    }
    assert sum(ended["seconds"].values()) == pytest.approx(time.monotonic() - trainer.run.phases.began, abs=5)
    lines = metrics_of(tmp)
    assert {line["attempt"] for line in lines} == {1} and all(abs(line["time"] - time.time()) < 600 for line in lines)


def test_status_is_fresh_though_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    place = RunDirectory(tmp_path)
    with heartbeat.Heartbeat(place):
        time.sleep(0.2)
        assert not (tmp_path / "STATUS").exists()  # this is no attempt yet
        place.begin()
        times = set()
        for _ in range(40):
            time.sleep(0.05)
            times.add(json.loads((tmp_path / "STATUS").read_text())["time"])
    assert len(times) > 5
    place.write_status("done", 3, "", 0)
    place.beat()
    assert json.loads((tmp_path / "STATUS").read_text())["state"] == "done"


@pytest.mark.parametrize("kind", ["full", "deaf"])
def test_a_disk_that_cannot_hold_status_holds_nothing_up(tmp_path, monkeypatch, kind):
    def broken(*_):
        if kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(60)

    place = RunDirectory(tmp_path)
    monkeypatch.setattr(directory, "replace_or_overwrite", broken)
    began = time.monotonic()
    with heartbeat.Heartbeat(place):
        place.begin()
        for phase in (Phase.STEP, Phase.EVALUATING, Phase.SAVING) * 5:
            with place.phases.during(phase):
                pass
    assert time.monotonic() - began < 5


def test_a_refused_attempt_leaves_no_trace(make, tmp_path):
    trainer = make("steps=3")
    list(trainer.steps())
    trainer.close()
    before = {name: (trainer.run.path / name).read_text() for name in ("STATUS", "attempts/goodput.jsonl")}
    place = RunDirectory(trainer.run.path)
    with heartbeat.Heartbeat(place):
        place.begin()
        assert status(trainer)["state"] == "preparing" and status(trainer)["step"] == 3
        place.write_failure("UserError: no", 2)
    assert {name: (trainer.run.path / name).read_text() for name in before} == before
    with pytest.raises(UserError):
        make("steps=3", resume="never")
    assert {name: (trainer.run.path / name).read_text() for name in before} == before


def attempt(first, last, began, ended, **seconds):
    times = {"job_start_time": began, "job_end_time": ended}
    return {"first_step": first, "step_count": last, **times, "seconds": seconds}


def test_steps_that_were_done_twice_are_lost_and_the_time_between_attempts_is_down():
    one = attempt(0, 10, 0.0, 120.0, step=100.0, start=20.0)
    two = attempt(
        6, 8, 150.0, 180.0, step=20.0, restore=10.0
    )  # from checkpoint 6: four steps of the first count no more
    three = attempt(4, 12, 170.0, 260.0, step=80.0, save=10.0)  # from 4, as 6 was broken; and a clock was set back
    account = add_up([one, two, three])
    assert account.attempts == 3 and sum(account.seconds.values()) == 120 + 30 + 90 + 30
    assert account.seconds["lost"] == 60 + 20 and account.seconds["down"] == 30
    assert account.seconds["step"] == 40 + 80 and account.goodput == pytest.approx(120 / 270, abs=1e-4)
    lines = list(account.table())
    assert lines[0] == "where the time went: 4:30 in 3 attempts" and lines[1].split() == ["step", "2:00", "44.4%"]
    assert add_up([]).goodput is None


def test_the_account_outlives_kills_and_damage(tmp_path):
    path = tmp_path / "goodput.jsonl"
    first = Goodput(path, Phases())
    first.begin(1)
    first.account(0, 5, None)
    first.account(0, 7, None)  # then it was killed
    assert [line["step_count"] for line in read_attempts(path)] == [7]
    with path.open("a") as file:
        file.write('{"attempt": 2, "seco')
    third = Goodput(path, Phases())
    third.begin(3)
    third.account(4, 9, 0)
    lines = read_attempts(path)
    assert [(line["attempt"], line["first_step"], line["step_count"]) for line in lines] == [(1, 0, 7), (3, 4, 9)]
    assert {"job_start_time", "job_end_time", "tpu_init_start_time"} <= set(lines[0]) and lines[1]["exit_code"] == 0
    path.write_bytes(b"\xff\xfe nothing\n[]\n3\n")
    assert read_attempts(path) == [] and read_attempts(tmp_path / "none") == []


def test_a_resumed_run_counts_both_attempts(make):
    trainer = make(checkpoint={"every": 3})
    for moment in trainer.steps():
        if moment.step == 5:
            break
    trainer.close()
    again = make(checkpoint={"every": 3})
    list(again.steps())
    again.close()
    lines = read_attempts(again.run.path / "attempts/goodput.jsonl")
    assert [(line["first_step"], line["step_count"], line["exit_code"]) for line in lines] == [(0, 5, None), (3, 8, 0)]
    ended = status(again)
    assert ended["attempt"] == 2 and ended["seconds"]["lost"] > 0 and ended["seconds"]["restore"] > 0
    assert {line["attempt"] for line in metrics_of(again.run.path)} == {1, 2}


def test_long_evaluations_are_healthy_and_a_batch_or_a_last_save_that_hangs_is_not(make, monkeypatch):
    bites = []
    monkeypatch.setattr(heartbeat, "end_all", lambda code, reason, place: bites.append((code, reason)))
    limits = {"phase_seconds": {"evaluation_batch": 1.5, "last_save": 1.5}}
    config = {"eval": {"every": 4, "batch_size": 4}, "checkpoint": {"every": None}, "log": limits}
    trainer = make(**config)
    evaluate, pauses = trainer._evaluate._eval_step, [0.0, *[0.5] * 6, *[0.0] * 6, 3.0]

    def one_batch(*arguments):
        time.sleep(pauses.pop(0) if pauses else 0.0)
        return evaluate(*arguments)

    def slow(*arguments, result=trees.PendingSave.result):
        time.sleep(3)
        return result(*arguments)

    monkeypatch.setattr(trainer._evaluate, "_eval_step", one_batch)
    for moment in trainer.steps():
        if moment.step == 4:
            assert len(pauses) == 7 and bites == []  # three seconds, and each batch a sign of life
        if moment.step == 7:
            monkeypatch.setattr(trees.PendingSave, "result", slow)
    trainer.close()
    said = list(dict.fromkeys(bites))
    assert [code for code, _ in said] == [124, 124]
    assert [reason.partition(" (")[2] for _, reason in said] == [
        "log.phase_seconds.evaluation_batch)", "log.phase_seconds.last_save)"
    ]  # fmt: skip
