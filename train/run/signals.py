"""SIGTERM, Ctrl-C and their like: finish the step, save, exit 75. A second Ctrl-C ends the process at once."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from mixtral_jax.train.errors import ExitCode

# Beside those two a terminal that is closed, and what `sbatch --signal` sends ahead of the end.
_OTHERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupts:
    """While entered, the first signal only sets a flag."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # with several processes jax itself listens to SIGTERM, so that all agree on the step
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        # what is ignored (nohup), or handled by somebody else, stays so
        others = [number for number in _OTHERS if signal.getsignal(number) is signal.SIG_DFL]
        if threading.current_thread() is threading.main_thread():
            for number in (*numbers, *others):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> str | None:
        """The signal that asked us to stop after `step`; all processes get the same answer for the same step."""
        if jax.process_count() > 1:
            return self._name or "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._name is not None and number == signal.SIGINT:
            os._exit(ExitCode.AT_ONCE)
        self._name = signal.Signals(number).name
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # jax's own handler tells the other processes
        # the handler may run inside another print: write by hand, in one call
        with contextlib.suppress(OSError):  # a terminal that is closed
            os.write(2, f"\n{self._name}: saving after this step; Ctrl-C again to end at once\n".encode())
