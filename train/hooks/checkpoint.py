"""Saving between steps, and the word about it."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from mixtral_jax.train.checkpoints import Best, Checkpointer, Saved, remedy, stands, why
from mixtral_jax.train.console import Console
from mixtral_jax.train.errors import StorageError, is_of_storage
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.hooks.sinks import Writer
from mixtral_jax.train.phases import Phase, Phases


class Checkpoint:
    """Saves the state, the position in the data and the configuration; reports finished saves."""

    def __init__(
        self, checkpointer: Checkpointer, writer: Writer, console: Console,
        items: Callable[[Moment], tuple[dict[str, Any], dict[str, Any]]], best: Best, phases: Phases | None = None,
    ):  # fmt: skip
        self._checkpointer, self._writer, self._console, self._items = checkpointer, writer, console, items
        self._best, self._phases = best, phases or Phases()
        self._refusal: StorageError | None = None  # the last one

    def due(self, step: int, last: bool) -> bool:
        return self._checkpointer.due(step, last) or step == self._best.step

    def run(self, moment: Moment) -> None:
        """Report the save under way, where it has ended, and start the one that is due.

        One in the background that is refused is made again behind a later step, with that step's state and rows.

        Raises:
            StorageError: the file system refused it, and all attempts after it; the checkpoints before stand.
        """
        with self._phases.during(Phase.SAVING):
            self._attempt(self._checkpointer.wait)
            if self._checkpointer.wanted(moment.step, moment.last) or moment.step == self._best.step:
                save = self._begin if self._checkpointer.asynchronous else self.save
                save(moment)

    def save(self, moment: Moment) -> None:
        """Save, and wait until it is whole; again where it is refused.

        Raises:
            StorageError: see `run`.
        """
        with self._phases.during(Phase.LAST_SAVE):
            self._attempt(self._checkpointer.wait)
            while pause := self._begin(moment) or self._attempt(self._checkpointer.wait):
                time.sleep(pause)
                self._phases.beat()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            StorageError: it, or one that is still to be made again, could not be written, and its state is gone.
        """
        with self._phases.during(Phase.LAST_SAVE):
            self._attempt(self._checkpointer.wait, again=False)
        if self._checkpointer.owes and self._refusal is not None:
            raise self._refusal

    def _begin(self, moment: Moment) -> float:
        if self._checkpointer.owed != moment.step:
            self._best.forget(self._checkpointer.owed)
        dataset, meta = self._items(moment)
        save = partial(self._checkpointer.save, moment.state, moment.step, dataset, meta, self._best.step)
        return self._attempt(save, again=jax.process_count() == 1)  # the others are in the midst of theirs

    def _attempt(self, action: Callable[[], Saved | None], *, again: bool = True) -> float:
        """Seconds after which it is to be tried again; 0: it is done."""
        try:
            saved = action()
        except Exception as error:
            if not is_of_storage(error):  # a worker, memory
                raise
            place = self._checkpointer.directory
            refused = f"a checkpoint could not be written to {place}: {why(error)}; {stands(place)}"
            pause = self._checkpointer.refused() if again else None
            self._refusal = StorageError(f"{refused}: {remedy(error)}")
            if pause is None:
                raise self._refusal from error
            self._console.say(f"{refused}; it is made again in {pause:g} s")
            return pause
        if saved is not None:
            self._phases.longest_save = max(self._phases.longest_save, saved.seconds)
            with contextlib.suppress(OSError):  # it is saved; the next line of metrics will say it again
                self._writer.write(saved.step, {"checkpoint/seconds": saved.seconds, "checkpoint/bytes": saved.bytes})
            told = f"checkpoint {saved.step}: {saved.bytes / 1e6:.1f} MB in {saved.seconds:.1f} s"
            self._console.say(told + f"; {saved.problem}" * bool(saved.problem))
        return 0.0
