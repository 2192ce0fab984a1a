"""Saving between steps, and the word about it."""

import contextlib
from collections.abc import Callable
from typing import Any

from mixtral_jax.train.checkpoints import Best, Checkpointer, Saved, saved_steps
from mixtral_jax.train.console import Console
from mixtral_jax.train.errors import AGAIN, ExitCode, StorageError, failure_of
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.hooks.sinks import Writer


class Checkpoint:
    """Saves the state, the position in the data and the configuration; reports finished saves."""

    def __init__(
        self, checkpointer: Checkpointer, writer: Writer, console: Console,
        items: Callable[[Moment], tuple[dict[str, Any], dict[str, Any]]], best: Best,
    ):  # fmt: skip
        self._checkpointer, self._writer, self._console, self._items = checkpointer, writer, console, items
        self._best = best

    def due(self, step: int, last: bool) -> bool:
        return self._checkpointer.due(step, last) or step == self._best.step

    def run(self, moment: Moment) -> None:
        """Raises StorageError where the file system refuses; the checkpoints before stand."""
        dataset, meta = self._items(moment)
        best = self._best.step
        self._attempt(lambda: self._checkpointer.save(moment.state, moment.step, dataset, meta, best), moment.step)

    def finish(self, step: int) -> None:
        """Wait for the save under way."""
        self._attempt(self._checkpointer.wait, step)

    def _attempt(self, action: Callable[[], Saved | None], step: int) -> None:
        try:
            saved = action()
        except OSError as error:
            steps = [s for s in saved_steps(self._checkpointer.directory) if s != step]
            stands = f"checkpoint {steps[-1]} stands" if steps else "there is no earlier checkpoint"
            failure, reason = failure_of(error), error.strerror or error
            if failure.sentence and failure.exit_code == ExitCode.UNEXPECTED:  # a worker, memory
                raise
            place = self._checkpointer.directory
            raise StorageError(
                f"a checkpoint could not be written to {place}: {reason}; {stands}: {failure.remedy or AGAIN}"
            ) from error
        if saved is not None:
            with contextlib.suppress(OSError):  # it is saved; the next line of metrics will say it again
                self._writer.write(saved.step, {"checkpoint/seconds": saved.seconds, "checkpoint/bytes": saved.bytes})
            self._console.say(f"checkpoint {saved.step}: {saved.bytes / 1e6:.1f} MB in {saved.seconds:.1f} s")
