"""A progress bar in a terminal, a plain line every few seconds elsewhere; on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


@contextmanager
def meter(title: str, total: int, *, show: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Gives a function that is told the bytes done since the last call, and of what."""
    terminal, total, done, last = sys.stderr.isatty(), max(1, total), 0, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    note = TextColumn("{task.fields[note]}")
    with Progress(*columns, note, console=Console(stderr=True), disable=not (show and terminal)) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(size: int, note: str) -> None:
            nonlocal done, last
            # Sizes of compressed input are estimates: never show more than 99 % before the end.
            done = min(done + size, int(0.99 * total))
            bar.update(task, completed=done, note=note)
            if show and not terminal and time.monotonic() - last > _LINE_SECONDS:
                last = time.monotonic()
                say(f"{title}: {100 * done / total:.0f} % {note}")

        yield advance


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)
