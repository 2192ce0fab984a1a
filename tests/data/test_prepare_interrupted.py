"""Preparation that is interrupted, and several processes that prepare the same data."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.data.config import DataConfig
from tests.prepared import (
    ROOT,
    SAMPLES,
    config_of,
    leftovers,
    lines_of,
    prepare_one,
    records_of,
)

_PROGRAM = """
import sys, time
from mixtral_jax.data.prepare import documents, pack, tokenise
from mixtral_jax.data.records import sources
from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare.prepared import prepare

sources.LUMP_BYTES, sources._READ_BYTES, sources.UNIT_BYTES, documents.BUCKET_BYTES = 4000, 2000, 12_000, 40_000
config, slow = DataConfig.model_validate_json(sys.argv[1]), sys.argv[2]
if slow:
    module = tokenise if slow == "tokenise_unit" else pack
    original = getattr(module, slow)
    count = 0
    def delayed(job):
        global count
        count += 1
        if count == int(sys.argv[3]):
            print("there", flush=True)
            time.sleep(float(sys.argv[4]))
        return original(job)
    setattr(module, slow, delayed)
print(prepare(config, 64, 0, progress=True).train[0].rows, flush=True)
"""


def _start(config: DataConfig, slow: str = "", at: int = 0, seconds: float = 0) -> subprocess.Popen[str]:
    arguments = [config.model_dump_json(), slow, str(at), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.usefixtures("small_lumps")
@pytest.mark.parametrize(("step", "at"), [("tokenise_unit", 3), ("pack_bucket", 1)])
def test_killed_half_way_leaves_nothing_that_counts(tmp_path: Path, step: str, at: int) -> None:
    path = lines_of(tmp_path, SAMPLES / "fr.val.jsonl.gz")
    config = config_of(tmp_path / "killed", path)
    process = _start(config, step, at, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any("tmp" in p.name for p in (tmp_path / "killed").rglob("*"))
    again = prepare_one(config)
    assert records_of(again) == records_of(prepare_one(config_of(tmp_path / "whole", path)))
    assert leftovers(tmp_path / "killed") == [again.fingerprint[:24]]


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    first = _start(config, "tokenise_unit", 1, 3)
    assert first.stdout is not None
    assert first.stdout.readline() == "there\n"
    second = _start(config, "tokenise_unit", 1, 0)
    out, err = second.communicate(timeout=60)
    rest, first_err = first.communicate(timeout=60)
    assert "waiting for another process that prepares it" in err
    assert "there" not in out  # it tokenised nothing itself
    assert out == rest
    assert first.returncode == second.returncode == 0, first_err


def test_the_workers_of_a_killed_process_end(tmp_path: Path) -> None:
    import psutil

    config = config_of(tmp_path / "cache", lines_of(tmp_path, SAMPLES / "fr.train.jsonl.gz"), workers=2)
    script = tmp_path / "run.py"
    script.write_text("from mixtral_jax.data.prepare import prepared as p; p._SERIAL_BYTES = 0\n" + _PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(script), config.model_dump_json(), "", "0", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children: list[Any] = []
    deadline = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert len(children) == 2
    assert not alive
