"""A pool of processes that holds a bounded number of jobs and gives results in the order of the jobs."""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Self, TypeVar

from data.tokenizer import Tokenizer, load_tokenizer

J = TypeVar("J")
R = TypeVar("R")


class Workers:
    """`count` processes; with one, jobs run in this process."""

    def __init__(self, count: int):
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._count > 1:
            # spawn: a fork of a process in which JAX runs its threads may hang
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_start_worker)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def ordered(self, function: Callable[[J], R], jobs: Iterator[J]) -> Iterator[tuple[J, R]]:
        """Yields (job, result). `jobs` is read only a few ahead, so that memory stays bounded."""
        if self._pool is None:
            for job in jobs:
                yield job, function(job)
            return
        waiting: deque[tuple[J, Future[R]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, self._pool.submit(function, job)))
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


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: they watch it themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.lru_cache(maxsize=2)
def process_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of this process, loaded once."""
    return load_tokenizer(path)
