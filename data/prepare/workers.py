"""A pool of processes that holds a bounded number of jobs and gives results in the order of the jobs.

The processes are plain subprocesses that import this package and nothing of the caller: no fork of a process in which
JAX runs its threads, and no second run of a user's script, as `multiprocessing` would make of one without a main guard.
A worker whose parent is gone reads the end of its input and ends too.
"""

import contextlib
import errno
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self, TypeVar

J = TypeVar("J")


class Workers:
    """`count` processes; with one, jobs run in this process."""

    def __init__(self, count: int):
        self._count = count
        self._threads = ThreadPoolExecutor(count) if count > 1 else None
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # of one that was killed, with a job in the buffer
                process.stdin.close()
            process.stdout.close()
            process.wait()

    def ordered(
        self, function: Callable[[J], Any], jobs: Iterator[J], heard: Callable[[J, Any], None] = lambda job, value: None
    ) -> Iterator[tuple[J, Any]]:
        """Yields (job, result). `jobs` is read only a few ahead, so that memory stays bounded.

        What a generator yields goes to `heard` at once, from any thread but never from two; what it returns is the
        result.
        """
        if self._threads is None:
            for job in jobs:
                yield job, _drive(function, job, functools.partial(heard, job))
            return
        one = threading.Lock()

        def run(job: J) -> Any:
            def note(value: Any) -> None:
                with one:
                    heard(job, value)

            return self._run(function, job, note)

        waiting: deque[tuple[J, Future[Any]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, self._threads.submit(run, job)))
                if len(waiting) > 4 * self._count:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:  # after an error nobody may still write where the caller cleans up
            for _, future in waiting:
                future.cancel()
            wait([future for _, future in waiting])

    def _run(self, function: Callable[[Any], Any], job: Any, note: Callable[[Any], None]) -> Any:
        """One job in the process of this thread."""
        process: subprocess.Popen[bytes] | None = getattr(self._local, "process", None)
        if process is None:
            process = self._local.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from mixtral_jax.data.prepare.workers import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search_path()},
            )  # fmt: skip
            self._processes.append(process)
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((function, job), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            while (message := pickle.load(process.stdout))[0] is None:
                note(message[1])
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # it is gone, perhaps amid its answer
            code = process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise ChildProcessError(errno.ECHILD, f"a worker {how}") from None
        succeeded, result = message
        if not succeeded:
            raise result
        return result


def search_path() -> str:
    """PYTHONPATH for a child that is to find this package wherever it stands, and nothing beside the caller."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(Path(__file__).parents[3]), *filter(os.path.isabs, inherited)])  # "" is where we stand


def _drive(function: Callable[[Any], Any], job: Any, note: Callable[[Any], None]) -> Any:
    """The result of a job; `note` is told what it yields before."""
    found = function(job)
    while isinstance(found, Generator):
        try:
            note(next(found))
        except StopIteration as end:
            return end.value
    return found


def serve() -> None:
    """The life of a worker: jobs from stdin, (succeeded, result or exception) to stdout, until stdin ends.

    Before that, (None, value) for each value that a job yields.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the results

    def send(answer: tuple[bool | None, Any]) -> None:
        try:
            pickle.dump(answer, results, pickle.HIGHEST_PROTOCOL)
            results.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent is gone; nothing is left to say to it

    while True:
        try:
            function, job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, _drive(function, job, lambda value: send((None, value)))
        except Exception as error:
            answer = False, error
        send(answer)
