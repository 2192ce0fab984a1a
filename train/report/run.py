"""All that the files of one run say, for its page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.train.attempts import Book, add_up, read_attempts
from mixtral_jax.train.report.experts import Loads, read_loads
from mixtral_jax.train.report.history import History, read
from mixtral_jax.train.report.thin import POINTS
from mixtral_jax.train.run_files import (
    NAMES,
    Advance,
    Standing,
    flat,
    json_object,
    lines_backwards,
    standing,
    yaml_object,
)

_LOG_LINES, _LOG_BYTES, _SAMPLED_STEPS = 40, 1 << 16, 4
_CHANGED = "changed_settings."
_HOURS = 2 * 3600.0  # from so many seconds on time is in hours


class Run(NamedTuple):
    """One run. `changed`: settings that differ from their defaults; older runs do not say."""

    name: str
    place: Path
    standing: Standing
    settings: dict[str, Any]
    changed: dict[str, Any]
    environment: dict[str, Any]
    history: History
    loads: Loads | None
    attempts: list[dict[str, Any]]
    book: Book
    samples: dict[int, dict[str, str]]  # step -> prompt -> text, of a few steps
    log: list[str]

    @property
    def began(self) -> float:
        """When, in seconds since 1970; NaN where nothing says so."""
        return min([*(attempt["job_start_time"] for attempt in self.attempts), *self._times[:1]], default=np.nan)

    @property
    def seconds(self) -> float:
        """From its beginning to its last line that says when it was written; NaN where none does."""
        return float(self._times[-1] - self.began) if len(self._times) else np.nan

    @property
    def _times(self) -> np.ndarray:
        times = self.history.clock.times
        return times[np.isfinite(times)]


def read_run(place: Path, name: str, points: int = POINTS, advance: Advance | None = None) -> Run:
    """Whatever is missing or damaged is empty; `advance` is told the bytes of the two large files as they are read."""
    environment = flat(json_object(place / "env.json"))
    attempts = read_attempts(place / "attempts" / "goodput.jsonl")
    return Run(
        name, place, standing(place), flat(yaml_object(place / "config.yaml"), skip=NAMES),
        {key.removeprefix(_CHANGED): value for key, value in environment.items() if key.startswith(_CHANGED)},
        {key: value for key, value in environment.items() if not key.startswith(_CHANGED)},
        read(place / "metrics.jsonl", points, advance), read_loads(place / "moe.jsonl", advance), attempts,
        add_up(attempts),
        _samples(place / "samples"), _log(place / "logs" / "process_0.log"),
    )  # fmt: skip


def lost_steps(attempts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, int]]:
    """(index of the attempt, first and last step) of what an attempt did and a later one did again."""
    for index, attempt in enumerate(attempts):
        kept = min((later["first_step"] for later in attempts[index + 1 :]), default=attempt["step_count"])
        first = max(kept, attempt["first_step"])
        if first < attempt["step_count"]:
            yield index, first, attempt["step_count"]


class Axes:
    """The places of points along x, each list of steps once: steps, and where every run has them tokens and time."""

    def __init__(self, runs: Sequence[Run]):
        clocks = [run.history.clock for run in runs]
        logged = all(len(clock.steps) for clock in clocks)
        self._has_tokens = logged and all(np.isfinite(clock.tokens).any() for clock in clocks)
        self._has_time = logged and all(np.isfinite(clock.times).any() for clock in clocks)
        self._unit = ("hours", 3600.0) if any(run.seconds > _HOURS for run in runs) else ("minutes", 60.0)
        self._names = dict[tuple[str, ...], str]()
        self.places = dict[str, dict[str, list[float]]]()

    def name(self, run: Run, steps: Sequence[float]) -> str:
        """The axis of a series with these steps."""
        key = run.name, *map(str, steps)
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self.places[self._names[key]] = self.at(run, steps)
        return self._names[key]

    def at(self, run: Run, steps: Sequence[float]) -> dict[str, list[float]]:
        """The places of steps on every kind of axis."""
        tokens, times = run.history.clock.at(steps)
        found = {"step": [int(step) if float(step).is_integer() else step for step in steps]}
        return found | ({"tokens": [*map(round, tokens)]} if self._has_tokens else {}) | self.times(run, times)

    def times(self, run: Run, times: Sequence[float] | np.ndarray) -> dict[str, list[float]]:
        """Seconds since 1970 as time since the run began; nothing where that is no axis."""
        name, seconds = self._unit
        return {name: [(time - run.began) / seconds for time in times]} if self._has_time else {}


def _samples(directory: Path) -> dict[int, dict[str, str]]:
    found = dict[int, dict[str, str]]()
    files = sorted(directory.glob("*.jsonl"), key=lambda file: (len(file.stem), file.stem))
    count = min(_SAMPLED_STEPS, len(files))
    for file in (files[round(i * (len(files) - 1) / max(1, count - 1))] for i in range(count)):
        for line in reversed(list(lines_backwards(file))):
            found.setdefault(line["step"], {})[str(line.get("prompt"))] = str(line.get("text"))
    return found


def _log(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _LOG_BYTES))
            return stream.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []
