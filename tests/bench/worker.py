"""A measurement that lives in a process of its own and takes one step whenever it is told to; see rounds.py."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLATFORM = os.environ.get("BENCH_PLATFORM", "cpu")  # where both sides compute: cpu, or cuda


def serve(step: Callable[[int], object], facts: Callable[[], dict[str, Any]] = dict) -> None:
    """Two steps to warm up, a line `ready`, then one step for each line of input and its seconds; at the end facts."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    for index in range(2):
        step(index)
    index = 2
    print("ready", file=answers, flush=True)
    while sys.stdin.readline():
        began = time.perf_counter()
        step(index)
        print(f"seconds {time.perf_counter() - began}", file=answers, flush=True)
        index += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("facts", json.dumps({"peak_bytes": peak, **facts()}), file=answers, flush=True)


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
