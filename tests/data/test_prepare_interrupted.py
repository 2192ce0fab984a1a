"""Preparation that is interrupted, and several processes that prepare the same data."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare import prepared
from mixtral_jax.data.prepare.tokenise import tokenise
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


def test_parts_that_are_joined_between_two_looks_are_not_made_again() -> None:
    looks = iter([False, True])
    corpus: Any = SimpleNamespace(
        parts=lambda count: [Path("part")], load=lambda: next(looks), load_part=lambda part, count: None
    )
    pool: Any = SimpleNamespace(ordered=lambda run, jobs, tell: map(run, jobs))
    tokenise([corpus], 1, 1, pool, show=False)


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


@pytest.mark.usefixtures("small_lumps")
def test_killed_before_any_change_of_names_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at its n-th rename or removal, for all n."""

    class Killed(BaseException):
        pass

    path = lines_of(tmp_path, SAMPLES / "fr.val.jsonl.gz")
    whole = records_of(prepare_one(config_of(tmp_path / "whole", path)))
    changes = [(os, "rename"), (os, "replace"), (shutil, "rmtree")]
    for n in itertools.count(1):
        left = n

        def mortal(original: Callable[..., Any]) -> Callable[..., Any]:
            def change(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Killed
                return original(*arguments, **options)

            return change

        config = config_of(tmp_path / f"killed-{n}", path)
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            for module, name in changes:
                patched.setattr(module, name, mortal(getattr(module, name)))
            prepare_one(config)
        assert records_of(prepare_one(config)) == whole
        assert len(leftovers(tmp_path / f"killed-{n}")) == 1
        if left > 0:
            break
    assert n > 5


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(p.read_bytes() + b'{"text": "more"}\n'), Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any]
) -> None:
    path = lines_of(tmp_path, SAMPLES / "fr.val.jsonl.gz")
    content, original = path.read_bytes(), prepared.tokenise
    whole = records_of(prepare_one(config_of(tmp_path / "whole", path)))
    with monkeypatch.context() as patched, pytest.raises((ValueError, FileNotFoundError), match=path.name):
        patched.setattr(prepared, "tokenise", lambda *a: [change(path), original(*a)])
        prepare_one(config_of(tmp_path / "cache", path))
    path.write_bytes(content)
    assert records_of(prepare_one(config_of(tmp_path / "cache", path))) == whole
