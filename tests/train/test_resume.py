"""Kill, signal, resume: the same numbers, bit for bit, as a run that nobody disturbed (NUMERICS G3, G4)."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mixtral_jax.checkpoint.slices import ArrayReader
from mixtral_jax.train.run.resume import Start
from tests.tiny import metrics_of, write_run_file

# Holds on just before checkpoint 6, which is on disk under its temporary name, gets its final one.
PAUSE = """
import os, sys, time
def pausing(move):
    def moved(source, target, **options):
        if os.path.basename(os.fspath(target)) == "6":
            print("in the middle of a save", flush=True)
            time.sleep(600)
        return move(source, target, **options)
    return moved
os.rename, os.replace = pausing(os.rename), pausing(os.replace)
from mixtral_jax import launch
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("forced", "resume", "again"),
    [
        (False, "auto", "run the same command again"), (False, "must", "run the same command again"),
        (False, "never", "go on with resume=auto"),
        (False, 4, "go on with resume=auto"), (True, "auto", "go on with resume=auto and without --force"),
    ],
)  # fmt: skip
def test_what_goes_on_where_a_run_was_stopped_is_said(make_config, forced, resume, again):
    assert Start(None, "", print, [], make_config(resume=resume), forced).again == again


def environment():
    """One CPU device; the tests' compilation cache."""
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": os.getcwd(),
    }


def launch(file, *overrides, code=None):
    python = [sys.executable, "-c", code] if code else [sys.executable, "launch.py"]
    return subprocess.Popen(
        [*python, "pretrain", str(file), *overrides],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process, expected):
    out, _ = process.communicate(timeout=400)
    assert process.returncode == expected, out
    return out


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def losses(place):
    return {line["step"]: line["train/loss"] for line in metrics_of(place) if "train/loss" in line}


def restored_leaves(place, step):
    """Every array of a checkpoint as it lies on disk."""
    reader = ArrayReader(place / "checkpoints" / str(step))
    return {name: np.asarray(reader.read(name, ())) for name in sorted(reader.names)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """8 steps in two micro-batches, checkpoints at 3, 6 and 8; the data are prepared once."""
    changes = {"log": {"every": 1}, "checkpoint": {"every": 3, "keep_last": 9}, "micro_batch_size": 4}
    return write_run_file(tmp_path_factory.mktemp("resume"), **changes)


@pytest.fixture(scope="module")
def undisturbed(file):
    finish(launch(file, "run_name=undisturbed"), 0)
    return file.parent / "runs" / "undisturbed"


def assert_same_run(place, undisturbed):
    assert losses(place) == losses(undisturbed)
    ours, theirs = restored_leaves(place, 8), restored_leaves(undisturbed, 8)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    for item in ("dataset", "meta"):
        a, b = (json.loads((p / "checkpoints/8" / item / "data.json").read_text()) for p in (place, undisturbed))
        a.get("config", {}).pop("run_name", None), b.get("config", {}).pop("run_name", None)
        assert a == b


def test_killed_in_the_middle_of_a_save_it_resumes_bit_for_bit(file, undisturbed):
    place = file.parent / "runs" / "killed"
    process = launch(file, "run_name=killed", code=PAUSE)
    wait_for(process, "in the middle of a save")
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert list((place / "checkpoints").glob("6.*tmp*"))
    out = finish(launch(file, "run_name=killed"), 0)
    assert "resuming from checkpoint 3 at row 24" in out
    assert_same_run(place, undisturbed)
    assert not list((place / "checkpoints").glob("*tmp*"))


def test_sigterm_saves_ends_with_75_and_resumes_bit_for_bit(file, undisturbed):
    place = file.parent / "runs" / "terminated"
    process = launch(file, "run_name=terminated", "checkpoint.every=null")
    wait_for(process, "step 1/8")
    process.send_signal(signal.SIGTERM)
    out = finish(process, 75)
    status = json.loads((place / "STATUS").read_text())
    assert status["state"] == "preempted" and status["exit_code"] == 75
    assert f"exit 75: SIGTERM after step {status['step']}; checkpoint {status['step']} is saved" in out
    assert f"resuming from checkpoint {status['step']}" in finish(launch(file, "run_name=terminated"), 0)
    assert_same_run(place, undisturbed)


def test_the_same_seed_is_the_same_run(file, undisturbed):
    finish(launch(file, "run_name=again"), 0)
    assert_same_run(file.parent / "runs" / "again", undisturbed)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_bit_for_bit(file, undisturbed):
    """Killed again and again after random times, until it is done."""
    place = file.parent / "runs" / "unlucky"
    rng = np.random.default_rng(0)
    for _ in range(50):
        process = launch(file, "run_name=unlucky")
        try:
            process.communicate(timeout=5 + 5 * rng.random())
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    finish(launch(file, "run_name=unlucky"), 0)
    assert_same_run(place, undisturbed)
