"""pass@k of programs that a model wrote: each candidate runs in a process of its own, and can do little there.

It guards against what models write by mistake, and is no sandbox: whoever wants to gets out of it.
"""

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CPU_SECONDS, WALL_SECONDS = 5, 30  # a sleeper ends by the latter; a machine that is busy needs more than it computes
_LIMITS = {"CPU": CPU_SECONDS, "AS": 2 << 30, "FSIZE": 1 << 20, "NOFILE": 32, "NPROC": 64, "CORE": 0}
# Runs what stands on stdin behind a first line, and writes that line to where stdout was once all of it has run: who
# leaves early, in whatever way, has not. A new user and network namespace, where the system gives one, has no network,
# and takes root's right to raise the limits. The hook stays for good.
_RUNNER = f"""
import _posixsubprocess, ctypes, os, resource, signal, sys
def main():
    mark, _, program = sys.stdin.read().partition("\\n")
    out, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(0x50000000)
    for name, limit in {_LIMITS}.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        except ValueError:  # macOS has no limit of memory
            pass
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    closed = {{"os", "shutil", "subprocess", "socket", "ctypes", "pty", "resource", "fcntl", "tempfile", "sqlite3"}}
    unheard = {{"_dbm", "_gdbm"}}  # C, which opens files by itself
    harmless = {{"os.listdir", "os.scandir", "os.walk", "os.putenv", "os.unsetenv"}}
    def refuse(event, args):
        if event == "open" and args[2] & writes or event == "import" and args[0] in unheard or (
            event.partition(".")[0] in closed and event not in harmless):
            raise PermissionError(event)
    sys.addaudithook(refuse)
    _posixsubprocess.fork_exec = os.setsid = signal.pidfd_send_signal = None  # no hook hears of them
    exec(compile(program, "candidate", "exec"), {{}})  # as the hub's scorer: __name__ is not __main__
    os.write(out, mark.encode())
    os._exit(0)
main()
"""


def passes(program: str) -> bool:
    """Whether a program runs to its end: without an exception or an exit, within the limits.

    It has 5 s of a core (30 s by the clock), 2 GiB, an empty directory, nothing on stdin, and one process: by Python's
    own means it neither starts others, nor changes files, nor reaches a network. Its group is killed at the end.
    """
    mark, libraries = secrets.token_hex(16), {"LD_LIBRARY_PATH"} & os.environ.keys()  # without which no Python starts
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as said:
        told.write(f"{mark}\n{program}".encode(errors="replace"))
        told.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-P", "-I", "-B", "-X", "utf8", "-c", _RUNNER], cwd=empty,
            env={"OMP_NUM_THREADS": "1"} | {name: os.environ[name] for name in libraries}, stdin=told, stdout=said,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(WALL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said.seek(0)
        return said.read(len(mark) + 1) == mark.encode()


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of n candidates, c of them right, have a right one.

    Unbiased for samples that are independent (Chen et al., 2107.03374, eq. 1); k <= n.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


class CodeEval:
    """In place of `evaluate.load("code_eval")`, which fetches a program from the hub."""

    check: Callable[[], None] = staticmethod(lambda: None)  # called ahead of each document; may raise

    @classmethod
    def compute(
        cls, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], list[list[bool]]]:
        """pass@k, mean over documents, for each k that has so many candidates; and which passed.

        Args:
            references: of each document the code that tests a candidate, and raises where it is wrong.
            predictions: of each document its candidates.
        """
        results = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for test, candidates in zip(references, predictions, strict=True):
                cls.check()
                results.append(list(pool.map(passes, [f"{candidate}\n{test}" for candidate in candidates])))
        scores = {
            f"pass@{size}": sum(pass_at_k(len(right), sum(right), size) for right in results) / len(results)
            for size in k
            if size <= min(map(len, results))
        }
        return scores, results


@contextlib.contextmanager
def own_code_eval(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The harness's tasks that run code are scored here; `check` is called ahead of each document."""
    import evaluate

    of_hub, before = evaluate.load, CodeEval.check

    def load(path: str, *args: Any, **options: Any) -> Any:
        return CodeEval if path == "code_eval" else of_hub(path, *args, **options)

    evaluate.load, CodeEval.check = load, staticmethod(check)
    try:
        yield
    finally:
        evaluate.load, CodeEval.check = of_hub, before
