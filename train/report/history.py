"""What metrics.jsonl says of a run, in bounded memory: its curves, what came last, and how tokens and time go."""

import itertools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.train.report.thin import POINTS, Curve, Point
from mixtral_jax.train.run_files import TAIL_BYTES, Advance, lines_backwards, number

STAMPS = ("step", "time", "attempt")  # of every line
TOKENS, SCORES = "train/tokens", "eval/"


class Clock(NamedTuple):
    """Of the logged steps, which rise: tokens seen and seconds since 1970. NaN where a line does not say."""

    steps: np.ndarray
    tokens: np.ndarray
    times: np.ndarray

    def at(self, steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and times of steps, linear between the lines."""
        return _between(steps, self.steps, self.tokens), _between(steps, self.steps, self.times)


class History(NamedTuple):
    """`last`: the newest value of each metric, and its step; `rollbacks`: the lines that tell of one, in order."""

    curves: dict[str, list[Point]]
    last: dict[str, tuple[int, float]]
    clock: Clock
    rollbacks: list[dict[str, Any]]


def read(file: Path, points: int = POINTS, advance: Advance | None = None) -> History:
    """The whole file; damaged lines, values that are no numbers and steps that were done again are left out."""
    width = bucket_width(max((line["step"] for line in lines_backwards(file, TAIL_BYTES)), default=0), points)
    curves, last, rollbacks = dict[str, Curve](), dict[str, tuple[int, float]](), list[dict[str, Any]]()
    scores = dict[str, dict[int, float]]()  # they are few, and `eval` scores checkpoints in any order
    steps, tokens, times = array("q"), array("d"), array("d")
    for _, group in itertools.groupby(lines_backwards(file, advance=advance), lambda line: line["step"] // width):
        lines = list(group)
        for key in dict.fromkeys(itertools.chain(*lines)):
            said = ((line["step"], value) for line in lines if (value := number(line.get(key))) is not None)
            if key in STAMPS or not (bucket := list(said)):
                continue
            if key.startswith(SCORES):
                scores[key] = dict(reversed(bucket)) | scores.get(key, {})
            else:
                last.setdefault(key, bucket[0])
                curves.setdefault(key, Curve()).take(bucket)
        for line in lines:
            if TOKENS in line and (not steps or line["step"] < steps[-1]):
                steps.append(line["step"])
                tokens.append(_or_nan(line[TOKENS]))
                times.append(_or_nan(line.get("time")))
        rollbacks += [line for line in lines if "rollback/step" in line]
    for key, values in scores.items():
        score = sorted(values.items(), reverse=True)
        for _, part in itertools.groupby(score, lambda item: item[0] // width):
            curves.setdefault(key, Curve()).take(part)
        last[key] = score[0]
    clock = Clock(*(np.array(found[::-1]) for found in (steps, tokens, times)))
    return History({key: curve.points() for key, curve in curves.items()}, last, clock, rollbacks[::-1])


def bucket_width(newest: int, points: int) -> int:
    """Steps of a bucket."""
    return max(1, -(-(newest + 1) // points))


def _or_nan(said: Any) -> float:
    value = number(said)
    return np.nan if value is None else value


def _between(at: Sequence[float], steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    return np.interp(at, steps[known], values[known]) if known.any() else np.full(len(at), np.nan)
