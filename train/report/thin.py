"""Curves of a run of any length in a few hundred points, and none of them invented.

Steps are cut into buckets of equal width, of each of which the median, the least and the greatest value are kept; the
first and the last value of a curve are points of their own, and what is not finite is one at its very step.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

POINTS = 300


class Point(NamedTuple):
    """What a bucket holds: the middle of its steps, and of its values the median and the bounds."""

    step: float
    value: float
    low: float
    high: float


class Curve:
    """Takes values with their steps, the last step first, in memory that does not grow with their number."""

    def __init__(self, width: int):
        self._width, self._points = width, list[Point]()
        self._steps, self._values = list[int](), list[float]()  # of the bucket that is being filled
        self._odd: dict[tuple[int, str], int] = {}  # bucket and NaN, inf or -inf -> its first step there
        self._done = math.inf  # the steps from here on have their value

    def add(self, step: int, value: float) -> None:
        """A step that is not before the last one was done again since, and no longer counts."""
        if step >= self._done:
            return
        self._done = step
        if not math.isfinite(value):
            self._odd[step // self._width, str(value)] = step
            return
        if self._steps and (not self._points or step // self._width != self._steps[-1] // self._width):
            self._close()
        self._steps.append(step)
        self._values.append(value)

    def points(self) -> list[Point]:
        """By step; nothing can be added any more."""
        first = Point(self._steps.pop(), *[self._values.pop()] * 3) if len(self._steps) > 1 else None
        self._close()
        odd = [Point(step, *[float(value)] * 3) for (_, value), step in self._odd.items()]
        return sorted([*self._points, *([first] if first else []), *odd])

    def _close(self) -> None:
        if self._steps:
            middle, values = (self._steps[0] + self._steps[-1]) / 2, self._values
            self._points.append(Point(middle, statistics.median(values), min(values), max(values)))
        self._steps, self._values = [], []


def smoothed(points: Sequence[Point], count: int) -> list[Point]:
    """The mean over `count` points around each; their bounds stay. Curves of few points are left as they are."""
    if count < 2 or len(points) < 4 * count:
        return list(points)
    around = [points[max(0, i - count // 2) : i + count // 2 + 1] for i in range(len(points))]
    return [_mean(point, near) for point, near in zip(points, around, strict=True)]


def _mean(point: Point, near: Sequence[Point]) -> Point:
    finite = [other for other in near if math.isfinite(other.value)]
    if not math.isfinite(point.value):
        return point
    mean = statistics.fmean(other.value for other in finite)
    return Point(point.step, mean, min(other.low for other in finite), max(other.high for other in finite))
