"""Where the time of a run went, as its attempts say: <run>/attempts/goodput.jsonl, an object for each."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.train.console import clock
from mixtral_jax.train.phases import KINDS

LOST, DOWN = "lost", "down"  # steps that were done twice, or taken back; between two attempts
_SHOWN = 0.05  # seconds below which a kind is left out of the table


class Book(NamedTuple):
    """Seconds by kind of a run so far, and how many attempts it took."""

    seconds: dict[str, float]
    attempts: int

    @property
    def goodput(self) -> float | None:
        """The share of the time in which steps were done that count."""
        whole = sum(self.seconds.values())
        return round(self.seconds["step"] / whole, 4) if whole else None

    def table(self) -> Iterator[str]:
        """Lines for the last screen."""
        whole = sum(self.seconds.values())
        yield f"where the time went: {clock(whole)} in {self.attempts} attempt{'s' * (self.attempts != 1)}"
        for kind, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            if seconds >= _SHOWN:
                yield f"  {kind.replace('_', ' '):<10} {clock(seconds):>9} {seconds / whole:>7.1%}"


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """What each attempt says of itself; a line that is damaged is passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [attempt for attempt in map(_parsed, lines) if attempt is not None]


def add_up(attempts: Sequence[Mapping[str, Any]]) -> Book:
    """Seconds by kind. What an attempt did beyond the step that a later one began from is lost."""
    seconds = dict.fromkeys((*KINDS, LOST, DOWN), 0.0)
    kept = float("inf")  # the lowest step that a later attempt began from
    for attempt in reversed(attempts):
        own, first, last = attempt["seconds"], attempt["first_step"], attempt["step_count"]
        for kind in KINDS:
            seconds[kind] += own.get(kind, 0.0)
        undone = attempt.get("undone", 0)
        if lost := undone + max(0, last - max(first, kept)):
            again = own.get("step", 0.0) * lost / (undone + last - first)
            seconds["step"] -= again
            seconds[LOST] += again
        kept = min(kept, first)
    for one, other in itertools.pairwise(attempts):
        seconds[DOWN] += max(0.0, other["job_start_time"] - one["job_end_time"])  # clocks may be set
    return Book({kind: round(value, 3) for kind, value in seconds.items()}, len(attempts))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        attempt = json.loads(line)
        numbers = [attempt[key] for key in ("first_step", "step_count", "job_start_time", "job_end_time")]
        numbers.append(attempt.get("undone", 0))
        whole = all(math.isfinite(x) for x in (*numbers, *attempt["seconds"].values()))
        rises = 0 <= attempt["first_step"] <= attempt["step_count"] and numbers[-1] >= 0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return attempt if whole and rises else None
