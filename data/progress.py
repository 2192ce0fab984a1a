"""A progress bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


class Meter:
    """Progress of one piece of work that is measured in bytes; writes to stderr."""

    def __init__(self, title: str, total: int, *, show: bool = True):
        self._title, self._total, self._done = title, max(1, total), 0
        self._show, self._note = show, ""
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if show and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=self._total, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size: int, note: str = "") -> None:
        """Adds `size` to what is done."""
        # Sizes of compressed input are estimates: never show more than 99 % before the end.
        self._done = min(self._done + size, int(0.99 * self._total))
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=note)
        elif self._show and time.monotonic() - self._last > _LINE_SECONDS:
            self._last = time.monotonic()
            say(f"{self._title}: {100 * self._done / self._total:.0f} % {note}")


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)
