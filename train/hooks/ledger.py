"""What each step said of itself, read so late that nobody waits for it; and which time was training."""

import contextlib
import time
from typing import Any

import jax

from mixtral_jax.train.hooks.sinks import Writer
from mixtral_jax.train.hooks.throughput import Throughput
from mixtral_jax.train.step import StepReport


class Diverged(Exception):
    """Loss or gradient norm of `step` is not finite; the state is that before its update."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(f"step {step} has loss {loss} and gradient norm {grad_norm}")
        self.step = step


class Ledger:
    """The flag of each step, read one step late so that the device never waits for the host.

    A CPU is both: nothing is gained there, and the temporaries of two steps would be held at once.
    """

    def __init__(self, tokens: int, writer: Writer, throughput: Throughput):
        self.tokens, self.throughput = tokens, throughput
        self._writer, self._late = writer, jax.default_backend() != "cpu"
        self._open: tuple[int, StepReport] | None = None

    def enter(self, step: int, report: StepReport) -> None:
        """Check the step before, remember this one."""
        self.settle()
        self._open = (step, report)

    def follow(self) -> None:
        """Wait for the newest step where nothing is gained by not waiting."""
        if not self._late:
            began = time.perf_counter()
            self.settle()
            pause_for_memory(time.perf_counter() - began)

    def settle(self) -> None:
        """Wait for the newest step.

        Raises:
            Diverged: its loss or gradient norm was not finite. Its metrics are written, NaN and all.
        """
        if self._open is None:
            return
        (step, report), self._open = self._open, None
        flags = (report.healthy, report.scalars["train/tokens"], report.scalars["train/skipped"])
        healthy, tokens, skipped = jax.device_get(flags)
        if not healthy or skipped:  # said at once, whatever the interval of the log
            metrics = report.metrics() | {"train/tokens": self.tokens}
            self._writer.write(step, metrics)
        if not healthy:
            raise Diverged(step, metrics["train/loss"], metrics["train/grad_norm"])
        self.tokens += int(tokens)
        self.throughput.add(int(tokens))

    @contextlib.contextmanager
    def pause(self, *, counted: bool) -> Any:
        """Time spent in here is no training time, unless it is `counted`."""
        began = time.perf_counter()
        yield
        if not counted:
            self.throughput.exclude(time.perf_counter() - began)


def pause_for_memory(seconds: float) -> None:
    """Sleep for a moment, a hundredth of the `seconds` that a step was waited for, at most 2 ms.

    XLA's CPU client frees a step's temporaries within half a millisecond behind its results: a step begun at once would
    take as much memory again (0.7 GB at shape S).
    """
    time.sleep(min(0.002, seconds / 100))
