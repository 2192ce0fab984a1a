"""Processes that live side by side and take one step each in turn, so that a slow minute of the machine hits all."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.worker import PLATFORM

Results = dict[str, dict[str, Any]]
MAXTEXT, MAXTEXT_VENV = "tests.bench.theirs_maxtext", Path(".venv-maxtext")
OURS = ("tests.bench.ours", "tests.bench.tuning_ours", "tests.bench.speedrun_step")


class Worker:
    """A module of this folder that calls `worker.serve`, as a process."""

    def __init__(self, command: list[str]):
        # our own run as launch.py runs training
        command = ["tests.bench.kept", *command] if command[0] in OURS else command
        python = str(MAXTEXT_VENV.absolute() / "bin" / "python") if command[0] == MAXTEXT else sys.executable
        environment = {**os.environ, "JAX_PLATFORMS": PLATFORM, "HF_HUB_OFFLINE": "1"}
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two share a GPU
        self.name = " ".join(command)
        self.process = subprocess.Popen(
            [python, "-m", *command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def end(self) -> None:
        """End the process, however far it has come."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError), self.process:
            pass  # closes its pipes and waits

    def read(self, key: str) -> str:
        """What stands behind `key` on the next line that begins with it; what imports print comes before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(key):
                return line.removeprefix(key)
        raise RuntimeError(f"{self.name} ended before it said {key!r}, with status {self.process.wait()}")

    def step(self) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: reading says so
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        return float(self.read("seconds"))

    def facts(self) -> dict[str, Any]:
        """No more steps: hear what it has to say."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        facts: dict[str, Any] = json.loads(self.read("facts"))
        self.process.wait(timeout=60)  # it may have files to remove
        return facts


def in_turn(commands: dict[str, list[str]], steps: int) -> Results:
    """For each command its facts, the `times` of its steps and `seconds`, their median: A B C A B C."""
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            print(f"{name}: python -m {' '.join(command)}", file=sys.stderr, flush=True)
            workers[name] = Worker(command)
            stack.callback(workers[name].end)
            workers[name].read("ready")
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(steps):
            for name, worker in workers.items():
                times[name].append(worker.step())
        facts = {name: worker.facts() for name, worker in workers.items()}
    return {name: {**facts[name], "times": t, "seconds": statistics.median(t)} for name, t in times.items()}


def beside(name: str, ours: list[str], others: dict[str, list[str]], steps: int) -> Results:
    """Each of `others` alone beside ours, two processes at a time; `ratios` are its seconds through ours just before.

    What stands under `name` is of all our processes: their steps, and the median of each fact.
    """
    pairs = {other: in_turn({name: ours, other: command}, steps) for other, command in others.items()}
    mine = [pair[name] for pair in pairs.values()]
    times = [seconds for run in mine for seconds in run["times"]]
    facts = {key: statistics.median(run[key] for run in mine) for key in mine[0] if key != "times"}
    results: Results = {name: {**facts, "times": times, "seconds": statistics.median(times), "ratios": [1.0]}}
    for other, pair in pairs.items():
        ratios = [b / a for a, b in zip(pair[name]["times"], pair[other]["times"], strict=True)]
        results[other] = {**pair[other], "ratios": ratios}
    return results


def faster(run: dict[str, Any]) -> str:
    """How often ours goes into it: median, least and most of the pairs of steps."""
    ratios = run["ratios"]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}x{spread}"
