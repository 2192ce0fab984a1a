"""The pool: results in order, few jobs ahead, errors that reach the caller."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.workers import Workers, process_tokenizer

SAMPLES = Path(__file__).resolve().parent.parent / "data" / "samples"


def _slow_square(n: int) -> tuple[int, int]:
    time.sleep(0.02 * (n % 3))
    if n == 13:
        raise ValueError("job 13 is bad")
    return n * n, os.getpid()


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_jobs_are_taken_only_a_few_ahead(count: int) -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for n in range(13):
            taken.append(n)
            yield n

    ahead = []
    processes = set()
    with Workers(count) as pool:
        for done, (n, (square, pid)) in enumerate(pool.ordered(_slow_square, jobs())):
            assert (n, square) == (done, done**2)
            ahead.append(len(taken) - done)
            processes.add(pid)
    assert max(ahead) <= 4 * count + 1
    assert (os.getpid() in processes) == (count == 1)


def test_an_error_reaches_the_caller_after_the_jobs_before_it() -> None:
    done = []
    with Workers(2) as pool, pytest.raises(ValueError, match="job 13 is bad"):
        for n, _ in pool.ordered(_slow_square, iter(range(100))):
            done.append(n)
    assert done == list(range(13))


def test_a_tokenizer_is_loaded_once() -> None:
    path = str(SAMPLES / "tokenizer.model")
    assert process_tokenizer(path) is process_tokenizer(path)
