"""Programs that a model wrote: pass@k, and what a candidate can do here."""

import contextlib
import itertools
import os
import time
from pathlib import Path

import pytest

from mixtral_jax.train.evals.tasks import CodeEval, code, own_code_eval, pass_at_k, passes


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (6, 0), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_draws_that_have_a_right_one(n: int, c: int) -> None:
    for k in range(1, n + 1):
        draws = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_right_programs_pass() -> None:
    function = 'def add(x, y):\r\n    "sums"\r\n    return x + y\n'
    assert passes(f"{function}\nassert add(2, 3) == 5")
    assert not passes(f"{function}\nassert add(2, 3) == 6")
    assert passes(
        "import re, math, random, hashlib, heapq, datetime\nhashlib.md5(b'')\nif __name__ == '__main__': 1 / 0"
    )
    assert passes("import sys\nsys.stdout.close()\nsys.stderr.close()\nprint('é') if False else None")


NASTY = {
    "leaves with success": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "leaves by a signal": "import os; os.kill(os.getpid(), 15)",
    "prints to every file": "import os\nfor i in range(3, 40):\n  try: os.write(i, b'a' * 32)\n  except OSError: pass\n"
    "print('passed', flush=True)\nraise SystemExit(0)",
    "reads": "input()",
    "closes its output and leaves": "import sys, os\nsys.stdout.close()\nos.closerange(0, 99)\nraise SystemExit(0)",
    "is no program": "def f(:",
    "recurses": "def f(): return f()\nf()",
    "takes memory": "x = bytearray(3 << 30)",
    "writes a file": "open('large', 'w').write('a' * (1 << 20))",
    "removes a file": "import os; os.remove({victim!r})",
    "removes a tree": "import shutil; shutil.rmtree({directory!r})",
    "empties a file": "open({victim!r}, 'w')",
    "has children": "import os\nwhile True: os.fork()",
    "has many children": "from multiprocessing import Process\nwhile True: Process(target=print).start()",
    "has programs": "import subprocess; subprocess.run(['true'])",
    "calls home": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "has a database": "import sqlite3; sqlite3.connect({victim!r})",
    "has programs in its own way": "from multiprocessing.util import spawnv_passfds\n"
    "spawnv_passfds(b'/bin/true', [b'true'], ())",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
}


@pytest.mark.parametrize("program", NASTY.values(), ids=NASTY)
def test_nasty_programs_fail_and_harm_nothing(program: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("alive")
    assert not passes(program.format(victim=str(victim), directory=str(tmp_path)) if "{" in program else program)
    assert victim.read_text() == "alive"


def children() -> set[str]:
    """Processes that this one has started and not waited for, by number, the dead ones too."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(file.parent.name)
    return found


@pytest.mark.parametrize(
    "program",
    ["import time\ntime.sleep(60)", "import signal\nsignal.signal(signal.SIGXCPU, print)\nwhile True: pass",
     "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nraise SystemExit(0)"],
)  # fmt: skip
def test_who_does_not_end_is_ended(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "WALL_SECONDS", 1.5)
    before, began = children(), time.monotonic()
    assert not passes(program)
    assert time.monotonic() - began < 30
    assert children() <= before  # other tests of this process may have left some


def test_the_limit_of_computing_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes is ended by what it has computed, on a busy machine too."""
    monkeypatch.setattr(code, "_RUNNER", code._RUNNER.replace(f"'CPU': {code.CPU_SECONDS}", "'CPU': 1"))
    monkeypatch.setattr(code, "WALL_SECONDS", 300)
    began = os.times()
    assert not passes("while True: pass")
    assert os.times().children_user - began.children_user < 3


def test_code_eval_has_the_interface_of_the_hubs() -> None:
    import_ok = pytest.importorskip("evaluate", reason="needs lm_eval (extra: eval)")
    checks: list[int] = []
    with own_code_eval(lambda: checks.append(1)):
        scorer = import_ok.load("code_eval")
    assert scorer is CodeEval
    with own_code_eval(lambda: checks.append(1)):
        right, wrong = "def f(): return 1", "def f(): return 2"
        scores, results = scorer.compute(["assert f() == 1"] * 2, [[right, wrong], [wrong, wrong]], k=[1, 2, 3])
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert results == [[True, False], [False, False]]
    assert len(checks) == 2
