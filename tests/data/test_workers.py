"""The pool: results in order, few jobs ahead, errors that reach the caller, scripts without a main guard."""

import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.data.prepare.tokenise import process_tokenizer
from mixtral_jax.data.prepare.workers import Workers
from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.train.errors import failure_of

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data" / "samples"


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_jobs_are_taken_only_a_few_ahead(count: int) -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for n in range(30):
            taken.append(n)
            yield n

    ahead = []
    with Workers(count) as pool:
        for done, (n, root) in enumerate(pool.ordered(math.isqrt, jobs())):
            assert (n, root) == (done, math.isqrt(done))
            ahead.append(len(taken) - done)
    assert max(ahead) <= 4 * count + 1


def test_jobs_run_in_other_processes() -> None:
    with Workers(2) as pool:
        seen = {result for _, result in pool.ordered(os.getenv, iter(["PYTHONPATH"] * 3))}
    assert all(value.startswith(str(ROOT)) for value in seen)


def test_an_error_reaches_the_caller_after_the_jobs_before_it() -> None:
    done = []
    with Workers(2) as pool, pytest.raises(ValueError, match="nonnegative"):
        for n, _ in pool.ordered(math.isqrt, iter([*range(13), -1, *range(100)])):
            done.append(n)
    assert done == list(range(13))


def test_a_worker_that_dies_is_an_error_and_no_endless_wait() -> None:
    with Workers(2) as pool, pytest.raises(ChildProcessError, match="a worker ended with status 7"):
        list(pool.ordered(os._exit, iter([7])))


def killed_soon() -> None:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_a_worker_that_is_killed_is_what_the_error_says() -> None:
    """And not the broken pipe that is left of it, with a job in its buffer that does not fit."""
    with pytest.raises(ChildProcessError, match="a worker was ended by SIGKILL") as caught, Workers(2) as pool:
        for error, code in ((errno.ENOSPC, 74), (errno.EIO, 74), (errno.ENOENT, 2), (errno.EPIPE, 1)):
            with pytest.raises(OSError) as own:  # what a job says comes over whole
                pool._run(refuse, error, print)
            assert own.value.errno == error and failure_of(own.value).exit_code == code
        pool._run(call, killed_soon, print)
        time.sleep(0.3)
        pool._run(len, "x" * 4_000_000, print)
    assert failure_of(caught.value).exit_code == 1 and "data.workers" in failure_of(caught.value).sentence


def refuse(error: int) -> None:
    raise OSError(error, os.strerror(error))


def call(job: Any) -> None:
    job()


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nprint('started')\nfrom mixtral_jax.data.prepare.workers import Workers\n"
        "with Workers(2) as pool: print(list(pool.ordered(math.isqrt, iter([4, 9]))))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "started\n[(4, 2), (9, 3)]\n"


def test_nothing_beside_the_user_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that lie in the current directory under the names of modules are not what a worker imports."""
    for name in ("data", "train", "json", "pickle", "random", "numpy", "jax", "signal", "mixtral_jax"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    for inherited in ("", os.pathsep, f"{ROOT}{os.pathsep}", "."):  # an empty entry is the current directory too
        monkeypatch.setenv("PYTHONPATH", inherited)
        with Workers(2) as pool:
            lengths = [length for _, length in pool.ordered(length_of_file_name, iter("ab"))]
        assert lengths == [len(__file__)] * 2 and not (tmp_path / "marker").exists()


def length_of_file_name(_: str) -> int:
    import random  # as a library would, late

    return len(__file__) + 0 * len(random.__name__)


def test_a_tokenizer_is_loaded_once() -> None:
    path = str(SAMPLES / "tokenizer.model")
    fingerprint = load_tokenizer(path).fingerprint()
    assert process_tokenizer(path, fingerprint) is process_tokenizer(path, fingerprint)
