"""What asks a run to stop: signals, and the end of its time. Where there is nothing to save it ends at once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mixtral_jax.train import trainer as loop
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError, command, end_at_once
from mixtral_jax.train.hooks.evaluate import BrokenOff
from mixtral_jax.train.phases import Phase, Phases
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.signals import Interrupts, ends_of_time
from tests.tiny import metrics_of, write_run_file

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@pytest.fixture
def place(tmp_path):
    """A run that has begun its steps."""
    place = RunDirectory(tmp_path)
    place.phases.become(Phase.BETWEEN)
    return place


@pytest.fixture
def listened():
    """Whoever started the tests may ignore some of them: nohup."""
    before = {name: signal.signal(signal.Signals[name], signal.SIG_DFL) for name in NAMES}
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("name", NAMES)
def test_each_of_them_stops_after_the_step(name, place, listened, monkeypatch):
    monkeypatch.setattr(os, "write", closed_terminal)
    with Interrupts(place) as interrupts:
        assert interrupts.requested(1) is None
        interrupts.check()
        signal.raise_signal(signal.Signals[name])
        assert interrupts.requested(2) == name
        with pytest.raises(BrokenOff, match=name):
            interrupts.check()
    assert signal.getsignal(signal.Signals[name]) == signal.SIG_DFL


def closed_terminal(*_):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.RESTORING, Phase.COMPILING])
def test_before_the_first_step_each_of_them_ends_at_once(name, phase, tmp_path, listened, capsys):
    place = RunDirectory(tmp_path)
    with Interrupts(place), place.phases.during(phase), place.phases.during(Phase.READING):
        signal.raise_signal(signal.Signals[name])
        raise AssertionError("it went on")
    ended = json.loads((tmp_path / "STATUS").read_text())
    assert (ended["state"], ended["exit_code"]) == ("preempted", 75)
    assert ended["reason"].startswith(f"{name} while {phase.state}, ")
    assert capsys.readouterr().out == f"exit 75: {ended['reason']}\n"


def test_what_a_library_makes_of_it_is_no_error(tmp_path, listened):
    """Orbax, amid a restore, says that the checkpoint has another format: that would be final."""
    place = RunDirectory(tmp_path)
    with Interrupts(place), place.phases.during(Phase.RESTORING):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise UserError("checkpoint 16 does not fit") from error
    assert json.loads((tmp_path / "STATUS").read_text())["exit_code"] == 75
    with pytest.raises(UserError), Interrupts(place):  # without a signal it is one
        raise UserError("checkpoint 16 does not fit")


def test_no_signal_changes_the_code_of_a_command_that_has_ended(place, listened):
    """Python gives its handlers back before the process is gone: a run that had said `exit 0` ended with -10."""
    handlers = lambda: {signal.getsignal(signal.Signals[name]) for name in NAMES}  # noqa: E731 - short
    for last, after in ((False, {signal.SIG_DFL}), (True, {signal.SIG_IGN})):
        with command(last=last):
            assert handlers() == {end_at_once}
            with Interrupts(place):
                pass
            assert handlers() == {signal.SIG_IGN}
        assert handlers() == after


def test_a_signal_behind_the_outcome_is_late(start, monkeypatch, listened):
    """Of a run in which nothing was left to do: until then it would have ended at once."""
    assert start()[0] == 0
    write = RunDirectory.write_status

    def late(self, state, *args):
        said = write(self, state, *args)
        if state == "done":
            signal.raise_signal(signal.SIGUSR1)
        return said

    monkeypatch.setattr(RunDirectory, "write_status", late)
    code, ended = start()
    assert (code, ended["state"], ended["exit_code"]) == (0, "done", 0)


def test_what_is_ignored_or_taken_stays_so(place):
    """`nohup` ignores SIGHUP, and somebody else may listen to SIGUSR1."""
    heard = []
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))]
    try:
        with Interrupts(place) as interrupts:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
            assert interrupts.requested(1) is None and heard == [1]
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])


DEAF = """
import hashlib, os, signal, sys, threading, time
from pathlib import Path
from mixtral_jax.train.phases import Phase
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.signals import Interrupts
place = RunDirectory(Path(sys.argv[1]))
place.phases.become(Phase[sys.argv[2]])
names = sys.argv[3:]
with Interrupts(place):
    def send():
        for name in names:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.Signals[name])
    threading.Thread(target=send, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 28)  # minutes, and as deaf to Python's handlers as a compiler
"""


@pytest.mark.parametrize(
    ("phase", "names", "code", "reason"),
    [
        ("COMPILING", ["SIGTERM"], 75, "SIGTERM while compiling, "),
        ("BETWEEN", ["SIGTERM", "SIGINT"], 130, "a second Ctrl-C"),
    ],
)
def test_a_main_thread_that_hears_nothing_is_ended_too(tmp_path, phase, names, code, reason):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", DEAF, str(tmp_path), phase, *names], timeout=120, capture_output=True)
    assert done.returncode == code and time.monotonic() - began < 40, done
    ended = json.loads((tmp_path / "STATUS").read_text())
    assert ended["exit_code"] == code and ended["reason"].startswith(reason)
    assert f"exit {code}: {reason}" in done.stderr.decode()


def test_the_time_that_is_left_is_that_of_the_file_and_of_the_job():
    phases = Phases()
    assert ends_of_time(phases, None, {}) == {}
    assert ends_of_time(phases, None, {"SLURM_JOB_END_TIME": "soon"}) == {}
    assert ends_of_time(phases, None, {"SLURM_JOB_END_TIME": f"{time.time() - 60}"}) == {}  # of a job that has ended
    ends = ends_of_time(phases, 2.5, {"SLURM_JOB_END_TIME": f"{time.time() + 600:.0f}"})
    assert {name: round(whole) for name, (_, whole) in ends.items()} == {
        "stop_after_minutes 2.5": 150, "SLURM_JOB_END_TIME": pytest.approx(600, abs=2)
    }  # fmt: skip


def test_the_run_stops_so_early_that_it_can_be_saved(place):
    place.phases.longest_save = 30.0
    assert Interrupts(place, stop_after_minutes=0.55).requested(1) is None
    assert Interrupts(place, stop_after_minutes=0.5).requested(1) == "the end of the time (stop_after_minutes 0.5)"


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs the tiny run on one device; returns its exit code and its STATUS."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)

    def start(*overrides, **changes):
        config = load_config(write_run_file(tmp_path, **changes), overrides).config
        code = loop.run(config)
        return code, json.loads((config.run_dir / "STATUS").read_text())

    return start


def test_an_evaluation_is_broken_off_within_a_batch_and_made_up_for(start, tmp_path, monkeypatch, listened):
    """At the last step too: then nothing but the evaluation is left to do."""
    changes = {
        "eval": {"every": 4, "batch_size": 1}, "log": {"every": 1}, "early_stopping": {"metric": "eval/loss"},
        "sample": {"every": 4, "prompts": ["the"], "max_new_tokens": 2}, "checkpoint": {"keep_last": 9},
    }  # fmt: skip
    assert start("run_name=whole", **changes)[0] == 0
    polls = []

    def disturbed(self, check=Interrupts.check):
        if self._place.step == step:
            polls.append(self._phases.now)
            if len(polls) == 3:
                signal.raise_signal(signal.SIGUSR1)
        check(self)

    for step in (4, 4, 8):  # that of the checkpoint is made up for, and may be broken off as well
        polls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Interrupts, "check", disturbed)
            code, ended = start(**changes)
        assert code == 75 and len(polls) == 3 and set(polls) == {Phase.EVALUATING}
        assert (ended["state"], ended["step"]) == ("preempted", step)
        assert ended["reason"].startswith(f"SIGUSR1 after step {step}; checkpoint {step} is saved")
        assert not any("eval/loss" in line for line in metrics_of(tmp_path / "runs/run") if line["step"] == step)
    assert start(**changes)[0] == 0
    again, whole = (numbers(tmp_path / "runs" / name) for name in ("run", "whole"))
    assert again == whole
    best = [os.readlink(tmp_path / f"runs/{name}/checkpoints/best") for name in ("run", "whole")]
    assert best == ["8", "8"]
    assert (tmp_path / "runs/run/samples/8.jsonl").exists()
    code, ended = start(**changes)
    assert code == 0 and ended["reason"].startswith("nothing left to do") and numbers(tmp_path / "runs/run") == whole


def numbers(place):
    """What a run has learned and measured, by step; each of it once."""
    lines = [{k: v for k, v in line.items() if k.startswith(("step", "train", "eval"))} for line in metrics_of(place)]
    return sorted((line for line in lines if len(line) > 1), key=lambda line: (line["step"], "eval/loss" in line))


def test_the_end_of_the_time_saves_and_ends_with_75(start, monkeypatch):
    code, ended = start("stop_after_minutes=0.0001")
    assert code == 75 and (ended["state"], ended["step"]) == ("preempted", 1)
    assert ended["reason"].startswith("the end of the time (stop_after_minutes 0.0001) after step 1; checkpoint 1 is")
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + 0.5}")
    code, ended = start()
    assert code == 75 and ended["step"] == 2 and "SLURM_JOB_END_TIME" in ended["reason"]
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert start()[0] == 0


def test_a_signal_that_comes_while_it_compiles_ends_the_run_at_once(start, monkeypatch, listened):
    monkeypatch.setattr(loop, "compiled", lambda *_, **__: signal.raise_signal(signal.SIGHUP))
    code, ended = start()
    assert code == 75 and ended["reason"].startswith("SIGHUP while compiling, ") and ended["step"] == 0
