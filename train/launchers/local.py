"""Processes on this machine under a supervisor that restarts them as an engine would, and kills them where asked to."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from mixtral_jax.data.prepare import search_path
from mixtral_jax.train.console import duration
from mixtral_jax.train.errors import ASKING, ExitCode, UserError
from mixtral_jax.train.launchers.job import Job, Plan
from mixtral_jax.train.launchers.verdict import Verdict, verdict
from mixtral_jax.train.plan import Topology
from mixtral_jax.train.run_files import json_object, last_attempt

_POLL, _PEERS, _SAVING = 0.2, 120.0, 300.0  # seconds: between looks; for the others to notice a death; for a save
# PR_SET_PDEATHSIG: even a supervisor that is killed leaves no processes that hold the run; jax forbids a preexec_fn
_TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
_WITH_US = (sys.executable, "-P", "-Sc", _TIED)


class Local(NamedTuple):
    """How processes are started, and what is done to them."""

    devices: int = 1  # virtual CPU devices of each
    on_cpu: bool = True
    kill_every: str | None = None  # so much of training, that every attempt comes to a step: 30s
    kills: int | None = None  # at most; None: until the run is done

    @property
    def kill_seconds(self) -> float | None:
        """`kill_every` as a number."""
        return None if self.kill_every is None else duration(self.kill_every, "--kill-every", "30s or 2m")


def plan(jobs: Sequence[Job], how: Local, topology: Topology | None) -> Plan:
    """No file but the run's own, and no command.

    Raises:
        UserError: kills that never come; accelerators for several processes.
    """
    if not how.on_cpu and jobs[0].nodes.processes > 1:
        raise UserError(f"--accelerators: one process has them all, --processes is {jobs[0].nodes.processes}")
    for option, value in (("--kill-every", how.kill_seconds), ("--kills", how.kills)):
        if value is not None and value <= 0:
            raise UserError(f"{option} is {value:g}: more than 0 is expected")
    if how.kills is not None and how.kill_every is None:
        raise UserError(f"--kills {how.kills} without --kill-every, such as 30s")
    return {}, []


def supervise(jobs: Sequence[Job], how: Local) -> int:
    """One after another; a signal ends them all. The code of the first that did not end well."""
    codes = []
    for job in jobs:
        supervisor = Supervisor(job, how)
        codes.append(supervisor.run())
        if supervisor.asked:
            break
    codes += [ExitCode.STOPPED] * (len(codes) < len(jobs))  # some have not begun
    return next(filter(None, codes), ExitCode.DONE)


class Supervisor:
    """Starts all processes of a run, again and again, until it is done or ended for good."""

    def __init__(self, job: Job, how: Local, say: Callable[[str], None] | None = None):
        self._job, self._how, self._say = job, how, say or partial(print, flush=True)  # a pipe is read at once
        self._killed, self._before = 0, 0
        self.asked, self._told = 0, 0  # how often a signal came, and was passed on
        self._processes: list[subprocess.Popen[bytes]] = []
        self._due: float | None = None  # when the next is killed; None: the run does not train yet

    def run(self) -> int:
        """The exit code of the run: its last word, which is 75 where a signal asked the supervisor to stop.

        The first signal is passed on as SIGTERM, on which the run saves, the next as Ctrl-C, on which it ends at once.
        """
        began, number, found = time.monotonic(), 0, Verdict(True, ExitCode.STOPPED, "")
        with self._signals():
            while found.again and not self.asked:
                number += 1
                self._before, self._due = last_attempt(self._job.run), None
                try:
                    ended = self._attempt()
                finally:  # of no error of ours an orphan is left
                    self._end(self._processes)
                found = verdict(self._job.run, ended, self._before)
                self._say(f"attempt {number}: {found.short}")
        self._say(f"{number} attempts, {self._killed} kills, {time.monotonic() - began:.0f} s")  # the run has a table
        return found.code if found.code >= 0 else 128 - found.code

    def _attempt(self) -> int:
        """One start of all processes; the code that says most, as a launcher of several would have it."""
        port = _free_port()
        self._processes = processes = []
        for index in range(self._job.nodes.processes):
            processes.append(self._start(index, port))
        ends: float | None = None
        while None in [p.poll() for p in processes]:  # all are looked at
            time.sleep(_POLL)
            if self._told < self.asked:
                self._pass_on(processes)
            if self.asked or any(p.returncode is not None for p in processes):
                ends = ends or time.monotonic() + (_SAVING if self.asked else _PEERS)
                if time.monotonic() > ends:
                    self._end(processes)
            elif self._is_due():
                self._kill(processes)
        codes = [p.returncode for p in processes]  # a mistake that one names says more than a signal of ours to others
        return next((c for c in codes if c in ExitCode.final() and c), None) or min(codes, key=lambda c: (c >= 0, -c))

    def _start(self, index: int, port: int) -> subprocess.Popen[bytes]:
        command, count, how = self._job.command(), self._job.nodes.processes, self._how
        command += ["--num-processes", str(count)]  # whatever an allocation around us says
        if count > 1:
            command += ["--coordinator", f"127.0.0.1:{port}", "--process-id", str(index)]
        environment = {**os.environ, "PYTHONPATH": search_path()}
        if how.on_cpu:
            flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={how.devices}"
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
        out = None if index == 0 else subprocess.DEVNULL  # each has its own log in the run's directory
        command = [*_WITH_US, *command] if sys.platform == "linux" else command
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)

    def _is_due(self) -> bool:
        if self._how.kill_seconds is None or self._killed == self._how.kills:
            return False
        if self._due is None:
            status = json_object(self._job.run / "STATUS")
            if status.get("state") == "training" and status.get("attempt", 0) > self._before:
                self._due = time.monotonic() + self._how.kill_seconds
        return self._due is not None and time.monotonic() >= self._due

    def _kill(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """The next one in turn, as a machine that is taken away."""
        index = self._killed % len(processes)
        self._killed, self._due = self._killed + 1, None
        self._say(f"kill {self._killed}: process {index}")
        processes[index].kill()

    def _pass_on(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.send_signal(signal.SIGINT if self._told else signal.SIGTERM)
        self._told += 1

    @staticmethod
    def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(number: int, frame: Any) -> None:
            self.asked += 1

        before = {number: signal.signal(number, ask) for number in ASKING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
