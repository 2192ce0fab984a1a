"""Curves of a run of any length in a few hundred points, and none of them invented.

Steps are cut into buckets of equal width, of each of which the median (of two in the middle the lower one), the least
and the greatest value are kept. The first and the last value of a curve are points of their own too, and so is what is
not finite, at its very step.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

POINTS = 300


class Point(NamedTuple):
    """What a bucket holds: the middle of its steps, and of its values the median and the bounds."""

    step: float
    value: float
    low: float
    high: float


class Curve:
    """Takes one bucket of values after the other, the last step first; its memory grows with their number alone."""

    def __init__(self) -> None:
        self._points = list[Point]()
        self._newest: Point | None = None
        self._oldest: Point | None = None
        self._done = math.inf  # the steps from here on have their value

    def take(self, bucket: Iterable[tuple[int, float]]) -> None:
        """Steps and their values. A step that is not before the last one was done again since, and no longer counts."""
        steps, values, odd = list[int](), list[float](), dict[str, int]()
        for step, value in bucket:
            if step < self._done:
                self._done = step
                if math.isfinite(value):
                    steps.append(step)
                    values.append(value)
                else:
                    odd[str(value)] = step  # the first of its kind here
        self._points += [_exactly(step, float(value)) for value, step in odd.items()]
        if values:
            middle = (steps[0] + steps[-1]) / 2
            middle += 0.25 * (middle in odd.values())  # beside what is not finite there
            self._points.append(Point(middle, statistics.median_low(values), min(values), max(values)))
            self._newest = self._newest or _exactly(steps[0], values[0])
            self._oldest = _exactly(steps[-1], values[-1])

    def points(self) -> list[Point]:
        """By step; no two of one."""
        ends = (end for end in (self._oldest, self._newest) if end)
        return sorted({point.step: point for point in (*ends, *self._points)}.values())


def smoothed(points: Sequence[Point], count: int) -> list[Point]:
    """The mean over `count` points around each; their bounds stay. Curves of few points are left as they are."""
    if count < 2 or len(points) < 4 * count:
        return list(points)
    around = [points[max(0, i - (count - 1) // 2) : i + count // 2 + 1] for i in range(len(points))]
    return [_mean(point, near) for point, near in zip(points, around, strict=True)]


def _exactly(step: int, value: float) -> Point:
    return Point(step, value, value, value)


def _mean(point: Point, near: Sequence[Point]) -> Point:
    if not math.isfinite(point.value):
        return point
    return point._replace(value=statistics.fmean(other.value for other in near if math.isfinite(other.value)))
