"""One attempt of a run: its processes, the fault that is made to them, and how they end."""

import glob
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.checks import read_status
from tests.soak.faults import FAKETIME, STOPS, Fault, specification
from tests.soak.victim import FILLER, fill

ROOT = Path(__file__).resolve().parents[2]
MESHES = {1: "{data: 1}", 2: "{data: 1, fsdp: 2}", 4: "{data: 1, fsdp: 2, expert: 2}"}
# A busy machine may hold one process up for long; and compiling would take most of the time.
_FLAGS = (
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=1 "
    "--xla_cpu_collective_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=300"
)
_LIMIT, _PEER_LIMIT, _SILENCE = 300.0, 75.0, 30.0  # seconds; 60 and 10 are promised, on a machine that is not busy


@dataclass
class World:
    """Where the runs of one soak are."""

    file: Path  # the run file
    disk: Path  # holds runs and prepared data
    outputs: Path  # what the processes print
    compiled: Path  # what jax has compiled

    @property
    def runs(self) -> Path:
        return self.disk / "runs"

    @property
    def cache(self) -> Path:
        return self.disk / "cache"


@dataclass
class Ended:
    """How the processes of an attempt ended."""

    codes: list[int]
    seconds: float
    struck: bool  # the fault came to pass
    early: bool  # before the run had said a word
    outputs: list[str]
    problems: list[str] = field(default_factory=list)


class Attempt:
    """`processes` of one command, with a fault."""

    def __init__(
        self, world: World, name: str, fault: Fault, processes: int, usual: float, label: str, *,
        overrides: Sequence[str] = (), counts: Path | None = None,
    ):  # fmt: skip
        """`usual` is how many seconds an undisturbed attempt takes; `<counts>.<process>` gets the events of each."""
        self._counts, self._overrides = counts, overrides
        self._world, self._name, self._fault, self._usual = world, name, fault, usual
        self._run = world.runs / name
        self._clock = world.outputs / f"{label}.clock"
        self._logs = [world.outputs / f"{label}.{i}.out" for i in range(processes)]
        self._log_before = self._log_size()
        self._from_outside = fault.kind != "none" and fault.phase == "moment"
        self._hit, self._early = False, False
        self._full_since: float | None = None
        self._twin: subprocess.Popen[str] | None = None
        if fault.clock:
            self._clock.write_text(fault.clock[0])
        address = _free_address()
        self._began = time.monotonic()
        self._processes = [self._start(i, address) for i in range(processes)]

    def _start(self, process: int, address: str) -> subprocess.Popen[str]:
        spec = specification(self._fault, process, self._world.disk)
        if self._counts:
            spec["counts"] = f"{self._counts}.{process}"
        with self._logs[process].open("w") as out:
            return subprocess.Popen(
                self._command(spec), env=self._environment(process, address), cwd=ROOT, text=True,
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _command(self, spec: Mapping[str, object]) -> list[str]:
        mesh = MESHES[len(self._logs)]
        overrides = [f"run_name={self._name}", f"mesh={mesh}", "--timeout", "30", *self._overrides]
        return [
            sys.executable, "-m", "tests.soak.victim", json.dumps(spec), "pretrain", str(self._world.file), *overrides
        ]  # fmt: skip

    def _environment(self, process: int, address: str) -> dict[str, str]:
        own = {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": _FLAGS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self._world.compiled), "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "2",
        }  # fmt: skip
        if (count := len(self._logs)) > 1:
            own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(process)}
        if self._fault.clock:  # the monotonic clock stays, as it does where a machine's clock is set
            own |= {
                "LD_PRELOAD": glob.glob(FAKETIME)[0], "FAKETIME_TIMESTAMP_FILE": str(self._clock), "NO_FAKE_STAT": "1",
                "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        return {**os.environ, **own}

    def finish(self) -> Ended:
        """Make the fault at its time, and wait until every process is gone."""
        ends: dict[int, float] = {}
        problems: list[str] = []
        stepped = False
        while len(ends) < len(self._processes):
            time.sleep(0.02)
            passed = time.monotonic() - self._began
            for i, process in enumerate(self._processes):
                if i not in ends and process.poll() is not None:
                    ends[i] = passed
            if (
                not self._hit
                and self._fault.kind != "none"
                and self._fault.phase == "moment"
                and passed > self._fault.at * self._usual
            ):
                self._strike()
            if self._fault.clock and not stepped and passed > self._usual / 2:
                self._clock.write_text(self._fault.clock[1])
                stepped = True
            if self._fault.kind == "fill" and not self._full_since and (self._world.disk / FILLER).exists():
                self._full_since = passed
            if self._fault.free_after and self._full_since and passed > self._full_since + self._fault.free_after:
                (self._world.disk / FILLER).unlink(missing_ok=True)
            problems += self._look(passed, ends)
            if any("has not ended" in problem for problem in problems):
                break
        return self._ended(ends, problems)

    def _strike(self) -> None:
        """The fault that is made from outside, at its moment."""
        self._hit = True
        if self._fault.kind == "fill":
            fill(self._world.disk)
        elif self._fault.kind == "twin":
            self._twin = subprocess.Popen(
                self._command({}), env=self._environment(0, ""), cwd=ROOT, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        else:
            self._early = self._log_size() == self._log_before
            for i in self._fault.victims:
                self._processes[i].send_signal(signal.Signals[self._fault.kind])

    def _log_size(self) -> int:
        """Of the log of the first process that is struck, which a run begins before it does anything."""
        log = self._run / "logs" / f"process_{self._fault.victims[0]}.log"
        return log.stat().st_size if log.exists() else 0

    def _look(self, passed: float, ends: Mapping[int, float]) -> list[str]:
        """STATUS is never half written; who has lost a peer ends in time."""
        told = []
        try:
            status = None if self._fault.cut or self._fault.kind == "fill" else read_status(self._run)
        except ValueError as error:
            return [f"STATUS was half written after {passed:.1f} s: {error}"]
        age = time.time() - (status or {}).get("time", math.inf)
        if status and status["exit_code"] is None and _SILENCE < age < passed and not self._fault.clock and not ends:
            told.append(f"STATUS is {age:.0f} s old after {passed:.1f} s: {status}")
        if (ends and passed - min(ends.values()) > _PEER_LIMIT) or passed > _LIMIT:
            alive = [i for i in range(len(self._processes)) if i not in ends]
            told.append(f"process {alive} has not ended after {passed:.0f} s (the others: {dict(ends)})")
        return told

    def _ended(self, ends: Mapping[int, float], problems: list[str]) -> Ended:
        for process in self._processes:
            process.kill()
            process.wait()
        outputs = [log.read_text(errors="replace") for log in self._logs]
        codes = [process.returncode for process in self._processes]
        struck = self._hit or any("soak: strikes" in output for output in outputs)
        ended = Ended(codes, max(ends.values(), default=_LIMIT), struck, self._early, outputs, problems)
        if not problems:
            ended.problems += wrong_codes(self._fault, ended)
        if self._twin is not None:
            ended.problems += self._wrong_twin()
        return ended

    def _wrong_twin(self) -> list[str]:
        assert self._twin is not None
        ended = threading.Timer(_LIMIT, self._twin.kill)
        ended.start()
        output = self._twin.communicate()[0]
        ended.cancel()
        if self._twin.returncode == 2 and "error: " in output:
            return []
        if self._twin.returncode == 0 and "nothing left to do" in output:
            return []  # it waited until the first one was done
        return [f"a second start ended with {self._twin.returncode}: {output[-300:]}"]


def wrong_codes(fault: Fault, ended: Ended) -> list[str]:
    """Exit codes that INTERFACE does not promise. 0 is judged by what the run has done."""
    kind, codes = fault.kind, set(ended.codes)
    told = [f"exit codes {ended.codes}"] if "Traceback" in "".join(ended.outputs) and 1 in codes else []
    if not ended.struck or kind in ("none", "twin"):
        return told if codes <= {0} else [f"exit codes {ended.codes} of an attempt that nobody disturbed"]
    mine = {ended.codes[i] for i in fault.victims}
    others = {code for i, code in enumerate(ended.codes) if i not in fault.victims}
    if kind == "SIGKILL":
        allowed, of_others = {-9, 0}, {76, 0}
    elif kind in STOPS:
        number = -signal.Signals[kind].value
        allowed = of_others = {75, 0, *([number, 130] if ended.early else [])}
        of_others = of_others | {76} if ended.early else of_others
    else:
        allowed = of_others = {74, 0}
    if mine <= allowed and others <= of_others:
        return told
    return [f"exit codes {ended.codes} after {kind}"]


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
