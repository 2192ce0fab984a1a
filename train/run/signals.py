"""SIGTERM, Ctrl-C and their like, and the end of the time: finish the step, save, exit 75. A second Ctrl-C: at once.

While a run prepares, restores or compiles there is nothing to save: then a signal ends it at once. The main thread may
be deep in a compiler, where no handler of Python's runs, so a thread of its own hears signals too.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from mixtral_jax.train.errors import AGAIN, ASKING, ExitCode, end_at_once
from mixtral_jax.train.hooks import BrokenOff
from mixtral_jax.train.phases import Phases
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.peers import ask_to_stop, asked_to_stop, end_all

_GRACE_SECONDS = 3.0  # in which the main thread may end by itself
_UNSEEN_SAVE_SECONDS, _UNSEEN_SAVE_SHARE = 60.0, 0.1  # what a save may take before one was seen
_polls = itertools.count(1)  # every process asks equally often, in the same order

os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours


class Stopped(KeyboardInterrupt):  # which libraries let through
    """A signal came while there was nothing to save."""


class Interrupts:
    """While entered, a signal asks the run to stop; the time that it may take does so always."""

    def __init__(self, place: RunDirectory, stop_after_minutes: float | None = None):
        self._place, self._phases = place, place.phases
        self._ends = ends_of_time(place.phases, stop_after_minutes, os.environ)
        self._name: str | None = None  # what asks this process to stop
        self._agreed: str | None = None  # what asks all of them
        self._before: dict[int, Any] = {}
        self._theirs: int | None = None  # the handler of jax, which tells the other processes
        self._stopped: Stopped | None = None  # which was raised
        self._left = threading.Event()

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() > 1:
            address = _system_handler(signal.SIGTERM, None)
            self._theirs = address if address and address > signal.SIG_IGN else None
        # what is ignored (nohup), or handled by somebody else, stays so
        free = (signal.SIG_DFL, end_at_once)
        for number in ASKING:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) in free:
                self._before[number] = signal.signal(number, self._handle)
        heard, told = socket.socketpair()
        told.setblocking(False)
        self._told, self._wakeup = told, signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> bool:
        self._left.set()
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            self._told.close()
        for number, handler in self._before.items():  # a command has nothing left to end at once
            signal.signal(number, signal.SIG_IGN if handler is end_at_once else handler)
        if self._theirs:
            _system_handler(signal.SIGTERM, self._theirs)
        stopped = self._stopped
        if stopped is None or error is None or not (error is stopped or self._phases.ends_at_once):
            return False
        self._place.write_failure(str(stopped), ExitCode.STOPPED)  # a library may have made another error of it
        print(f"exit {ExitCode.STOPPED}: {stopped}")
        return True

    def requested(self, step: int) -> str | None:
        """What asks us to stop after `step`: a signal or the time; all processes get the same answer."""
        return self.asked()

    def asked(self) -> str | None:
        """What asks us to stop now. All processes ask equally often, behind the same steps, and hear the same."""
        if self._agreed is None:
            if self._name is None and jax.process_index() == 0 and (late := self._late()):
                self._ask(late)
            if jax.process_count() == 1:
                self._agreed = self._name
            elif multihost_utils.reached_preemption_sync_point(next(_polls)):
                self._agreed = asked_to_stop() or self._name or "SIGTERM"
        return self._agreed

    def check(self) -> None:
        """Raises BrokenOff where something asks us to stop now."""
        if name := self.asked():
            raise BrokenOff(name)

    def _late(self) -> str | None:
        """The limit that would be passed before the run could be saved."""
        for name, (end, whole) in self._ends.items():
            margin = self._phases.margin
            if margin is None:
                margin = min(_UNSEEN_SAVE_SECONDS, _UNSEEN_SAVE_SHARE * whole)
            if time.monotonic() + margin > end:
                return f"the end of the time ({name})"
        return None

    def _ask(self, name: str) -> None:
        if self._name is None:
            self._name = name
            if jax.process_count() > 1:
                ask_to_stop(name)
                if self._theirs:  # jax looks once a second, and lets all processes agree on when
                    ctypes.CFUNCTYPE(None, ctypes.c_int)(self._theirs)(signal.SIGTERM)
                elif not self._before:
                    signal.raise_signal(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its lines."""
        if not self._phases.ends_at_once:
            self._ask(signal.Signals(number).name)
        elif jax.process_count() == 1 and self._stopped is None:
            self._stopped = Stopped(self._nothing_to_save(number))
            raise self._stopped

    def _listen(self, heard: socket.socket) -> None:
        """In a thread of its own, whatever the main one does."""
        first = None
        with heard:
            while numbers := heard.recv(64):
                for number in filter(self._before.__contains__, numbers):
                    if first is None:
                        first = number
                        self._hear(number)
                    elif number == signal.SIGINT:
                        end_all(ExitCode.AT_ONCE, "a second Ctrl-C", self._place)

    def _hear(self, number: int) -> None:
        if self._phases.ends_at_once:
            if jax.process_count() == 1 and self._left.wait(_GRACE_SECONDS):
                return  # the main thread has heard it too
            if self._phases.ends_at_once:
                end_all(ExitCode.STOPPED, self._nothing_to_save(number), self._place)
        name = signal.Signals(number).name
        self._ask(name)
        if jax.process_index() > 0 and number != signal.SIGINT:
            return  # nobody sits there
        with contextlib.suppress(OSError):  # a terminal that is closed
            os.write(2, f"\n{name}: saving as soon as possible; Ctrl-C again to end at once\n".encode())

    def _nothing_to_save(self, number: int) -> str:
        return f"{signal.Signals(number).name} while {self._phases.state}, with nothing to save yet: {AGAIN}"


def ends_of_time(
    phases: Phases, stop_after_minutes: float | None, env: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """When the run must be saved: by what it is told, time.monotonic() of it, and the seconds from the start to it."""
    ends = {}
    if stop_after_minutes is not None:
        ends[f"stop_after_minutes {stop_after_minutes:g}"] = phases.began + 60 * stop_after_minutes
    try:
        left = float(env.get("SLURM_JOB_END_TIME", "")) - time.time()
    except ValueError:
        left = 0.0
    if left > 0:  # else it is that of a job that has ended
        ends["SLURM_JOB_END_TIME"] = time.monotonic() + left
    return {name: (end, end - phases.began) for name, end in ends.items()}


def _system_handler(number: int, handler: int | None) -> int | None:
    """Set the system's handler of a signal by its address, and return that of the one before; Python sees neither."""
    system = ctypes.CDLL(None).signal
    system.argtypes, system.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return system(int(number), handler)
