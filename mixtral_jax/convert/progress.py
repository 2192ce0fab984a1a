"""How far a conversion is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(title: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told the bytes done; bytes, rate and time left go to stderr."""
    terminal = sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not (show and terminal)
    ) as bar:
        task = bar.add_task(title, total=total)
        began = last = time.monotonic()

        def advance(n: int) -> None:
            nonlocal last
            bar.advance(task, n)
            now, done = time.monotonic(), bar.tasks[0].completed
            if terminal or not show or (now - last < _SECONDS_BETWEEN_LINES and done < total):
                return
            last, rate = now, done / max(now - began, 1e-9)
            text = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
            print(f"{title}: {text}, {(total - done) / max(rate, 1.0):.0f} s left", file=sys.stderr, flush=True)

        yield advance
