"""Saving between steps, and the word about it."""

from collections.abc import Callable
from typing import Any

from mixtral_jax.train.checkpoints import Best, Checkpointer, Saved, saved_steps
from mixtral_jax.train.console import Console
from mixtral_jax.train.errors import UserError
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
        """Raises UserError where the file system refuses; the checkpoints before stand."""
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
            reason = error.strerror or error
            raise UserError(
                f"a checkpoint could not be written to {self._checkpointer.directory}: {reason}; {stands}"
            ) from error
        if saved is not None:
            self._writer.write(saved.step, {"checkpoint/seconds": saved.seconds, "checkpoint/bytes": saved.bytes})
            self._console.say(f"checkpoint {saved.step}: {saved.bytes / 1e6:.1f} MB in {saved.seconds:.1f} s")
