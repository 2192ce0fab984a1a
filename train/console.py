"""What a person sees: a progress bar in a terminal, plain lines elsewhere; every line goes to the log file too."""

import math
import re
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.streams import Lasting


class Console:
    """Lines on stdout, and in logs/process_<i>.log with the time. Other processes than 0 write to their log only."""

    def __init__(self, log_file: Path, *, speak: bool = True, progress: bool = True):
        self._log, out = Lasting(log_file.open("a+", encoding="utf-8")), Lasting(sys.stdout)
        self._began = self._log.tell()
        self._rich = RichConsole(highlight=False, soft_wrap=True, file=cast(IO[str], out)) if speak else None
        self._progress: Progress | None = None
        if speak and progress and out.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self._rich, transient=True,
            )  # fmt: skip
        self._task: Any = None
        self._warned: set[str] = set()
        self._previous_showwarning = warnings.showwarning
        warnings.showwarning = self._show_warning

    def say(self, line: str) -> None:
        """One line (or a few)."""
        if self._rich is not None:
            self._rich.print(line, markup=False)
        for part in line.splitlines():
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {part}\n")
        self._log.flush()

    def move(self, log_file: Path) -> None:
        """Go on in another file, which begins with what was said; the one before is left as it was."""
        self._log.seek(self._began)
        said, before = self._log.read(), self._log
        before.truncate(self._began)
        self._log, self._began = Lasting(log_file.open("a+", encoding="utf-8")), 0
        self._log.write(said)
        before.close()

    def start(self, total: int, done: int) -> None:
        """Show the bar."""
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task("training", total=total, completed=done)

    def advance(self, done: int) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)

    def close(self) -> None:
        """Take the bar away and close the log."""
        if warnings.showwarning == self._show_warning:
            warnings.showwarning = self._previous_showwarning
        if self._progress is not None:
            self._progress.stop()
        self._log.close()

    def _show_warning(self, message: Warning | str, *where: Any, **more: Any) -> None:
        """Each warning once, as one line; after the end of this run as it was before."""
        if self._log.closed:
            self._previous_showwarning(message, *where, **more)
            return
        text = f"warning: {message}"
        if text not in self._warned:
            self._warned.add(text)
            self.say(text)


def train_line(step: int, steps: int, metrics: Mapping[str, float | None], eta_seconds: float) -> str:
    """One readable line of the training metrics."""
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {metrics['train/loss']:.4f}",
        _maybe(metrics, "train/accuracy", "acc {:.1%}"),
        _maybe(metrics, "rewards/accuracies", "chosen first {:.1%}"),
        f"grad {metrics['train/grad_norm']:.2f}",
        f"lr {metrics['train/learning_rate']:.2e}",
        _maybe(metrics, "moe/balance", "balance {:.2f}"),
        _maybe(metrics, "perf/tokens_per_second", "{:,.0f} tok/s"),
        _maybe(metrics, "perf/mfu", "mfu {:.1%}"),
        f"left {clock(eta_seconds)}",
    ]
    return " | ".join(p for p in parts if p)


def eval_lines(step: int, metrics: Mapping[str, float | None], sources: list[str]) -> str:
    """Two lines of an evaluation: all sources together, then each.

    Of each source its bits per byte, its loss where only answers count, or the reward accuracy of its pairs.
    """

    def each(key: str, form: str) -> str:
        return " | ".join(f"{name} {metrics[f'eval/{name}/{key}']:{form}}" for name in sources)

    head = f"eval at step {step}: loss {metrics['eval/loss']:.4f}"
    if "eval/pairs" in metrics:
        key, pairs = "rewards/accuracies", metrics["eval/pairs"]
        return f"{head}, chosen before rejected {metrics[f'eval/{key}']:.1%} of {pairs:.0f}\n  {each(key, '.1%')}"
    key = "bits_per_byte" if "eval/bits_per_byte" in metrics else "loss"
    head += f", perplexity {metrics['eval/perplexity']:.2f}"
    return f"{head}\n  {key.replace('_', ' ')}: {each(key, '.3f')}"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def age(seconds: float) -> str:
    """As `clock`, or 1.5 days from a day on."""
    return f"{seconds / 86400:.1f} days" if seconds >= 86400 else clock(seconds)


def duration(text: str, option: str, such: str) -> float:
    """Seconds of `30s`, `2m`, `12h`, `30d` or `4w`.

    Raises:
        UserError: it is none, which names the option and what it may be.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not found:
        raise UserError(f"{option} {text!r} is no time such as {such}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


def _maybe(metrics: Mapping[str, float | None], name: str, form: str) -> str:
    value = metrics.get(name)
    return "" if value is None else form.format(value)
