"""What each step said of itself, read so late that nobody waits for it; and which time was training."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mixtral_jax.train.hooks.sinks import Writer
from mixtral_jax.train.hooks.throughput import Throughput
from mixtral_jax.train.step import StepReport


class Diverged(Exception):
    """Why a run cannot go on at `step`; the state is that of the last good update."""

    def __init__(self, step: int, reason: str, done: int, scalars: Mapping[str, float]):
        super().__init__(reason)
        self.step, self.done = step, done  # done: steps that count; one that was skipped does
        self.loss, self.grad_norm = scalars["train/loss"], scalars["train/grad_norm"]

    @property
    def finite(self) -> bool:
        """Whether it is skips without end, and no NaN or infinity."""
        return self.done == self.step


class Ledger:
    """The flag of each step, read one step late so that the device never waits for the host.

    A CPU is both: nothing is gained there, and the temporaries of two steps would be held at once.
    """

    def __init__(
        self, tokens: int, writer: Writer, throughput: Throughput, max_skips: int = 20, skips: int = 0,
        logged: Callable[[int], bool] = lambda step: False,
    ):  # fmt: skip
        """`tokens` so far, and the `skips` up to now without an update between them; `max_skips` end the run.

        A step that is `logged` anyway has its line from there.
        """
        self.tokens, self.throughput, self.skips, self._max_skips = tokens, throughput, skips, max_skips
        self._writer, self._late = writer, jax.default_backend() != "cpu"
        self._logged = logged
        self._open: tuple[int, StepReport] | None = None

    def enter(self, step: int, report: StepReport) -> None:
        """Check the step before, remember this one."""
        try:
            self.settle()
        finally:  # the line of the step before may find no room
            self._open = (step, report)

    def follow(self) -> None:
        """Wait for the newest step where nothing is gained by not waiting, or where it may be the last."""
        if not self._late or self.skips + 1 >= self._max_skips:
            began = time.perf_counter()
            self.settle()
            pause_for_memory(time.perf_counter() - began)

    def settle(self) -> None:
        """Wait for the newest step.

        Raises:
            Diverged: its loss or gradient norm was not finite, or it was one skip in a row too many. Its metrics are
                written, NaN and all, where they can be.
        """
        if self._open is None:
            return
        (step, report), self._open = self._open, None
        flags = (report.healthy, report.scalars["train/tokens"], report.scalars["train/skipped"])
        healthy, tokens, skipped = jax.device_get(flags)
        if not healthy:
            metrics = report.metrics() | {"train/tokens": self.tokens}
            with contextlib.suppress(OSError):  # what is not finite weighs more; the file writes it where there is room
                self._writer.write(step, metrics)
            values = f"loss {metrics['train/loss']} and gradient norm {metrics['train/grad_norm']}"
            raise Diverged(step, f"step {step} has {values}; no update was made", step - 1, metrics)
        self.tokens += int(tokens)
        self.throughput.add(int(tokens))
        self.skips = self.skips + 1 if skipped else 0
        last_skip = self.skips >= self._max_skips
        metrics = report.metrics() | {"train/tokens": self.tokens} if skipped else {}
        if skipped and (last_skip or not self._logged(step)):  # said at once, whatever the interval of the log
            with contextlib.suppress(*[OSError] * last_skip):  # the end weighs more
                self._writer.write(step, metrics)
        if last_skip:
            why = (
                f"the last {self.skips} updates were skipped (optimizer.max_skips): the gradient norm, at step {step} "
                f"{metrics['train/grad_norm']:.3g}, stays above optimizer.skip_spikes times its running mean; lower "
                "the learning rate, or raise skip_spikes or set it null"
            )
            raise Diverged(step, why, step, metrics)

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
