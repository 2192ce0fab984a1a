"""Which row of which source is row r of the run: a pure function of r and of the legs, exact however long the run is.

Order 2 (checkpoints name it). A leg is a stretch of rows that are read with one mixture. The sources of a leg are the
leaves of a binary tree, in which the two smallest shares are joined again and again (Huffman's). A node whose smaller
child has the share q of its draws cuts them into blocks of W = ceil(1/q): the smaller child's draws before block b are
b W q, rounded up or down at random with the odds of its fraction, and those inside it lie at random places. So

- row r belongs to source s with probability p_s, whatever the rows before: there is no phase that a number of devices
  could be in step with;
- a node's count is less than 2 off, and a source's, which takes a share of each error above it, less than 7
  (2 times the sum of the reciprocal Fibonacci numbers, as a Huffman tree's weights grow at least like these): for any
  number of sources and any length;
- at multiples of q's denominator all is exact, so by size every row of a leg comes once in each sum of the rows.
"""

import hashlib
import heapq
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

ORDER = 2  # the version: a position in another one means nothing in this
_ROUNDS, _SMALL = 4, 64
_FIRST, _SECOND, _WORD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, (1 << 64) - 1


@dataclass(frozen=True)
class Leg:
    """A stretch of the run's rows, up to the next leg's first: one mixture."""

    first_row: int
    drawn: Mapping[str, int]  # rows of each source before the first; 0 where not named
    shares: Mapping[str, Fraction]  # above 0, with sum 1; sources that are not named are not read
    fingerprint: str = ""  # of the mixture


def shares(
    rows: Mapping[str, int], weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, Fraction]:
    """Exact shares of the sources, with sum 1.

    With weights p_s = w_s / sum(w), without them p_s = n_s / sum(n), n_s the rows. With a temperature p_s is in
    proportion to (w_s n_s)^(1 / temperature), w_s 1 without weights: above 1 it draws small sources more often than
    their size.

    Raises:
        ValueError: a temperature so low that a score leaves the range of numbers.
    """
    named = rows if weights is None else weights
    if temperature is None:
        scores = {name: Fraction(str(value)) for name, value in named.items()}  # 0.3 is three tenths
    else:
        try:
            sizes = {name: rows[name] if weights is None else weights[name] * rows[name] for name in named}
            scores = {name: Fraction(size ** (1 / temperature)) for name, size in sizes.items()}
        except OverflowError:
            scores = {}
        if not all(scores.values()) or not scores:
            raise ValueError(
                f"data.temperature, or a phase's, {temperature:g} is too low for these weights and sizes: shares leave "
                "the range of numbers"
            )
    total = sum(scores.values())
    return {name: score / total for name, score in scores.items()}


class GlobalOrder:
    """The endless sequence of rows of a run.

    A source runs through its own permutations, keyed by its name, so that none of its rows comes twice before all came
    once, whichever legs and other sources there are. One that a leg does not read stays where it is.

    Args:
        rows: of each source; its place among them is what `order[r]` names it by, and changes nothing else.
        legs: with ascending first rows; the last has no end.
    """

    def __init__(self, seed: int, rows: Mapping[str, int], legs: Sequence[Leg]):
        if not rows or min(rows.values()) < 1:
            raise ValueError(f"every source needs at least one row, found {dict(rows)}")
        self.rows, self.legs = dict(rows), tuple(legs)
        self._firsts = [leg.first_row for leg in legs]
        assert self._firsts == sorted(set(self._firsts)) and all(leg.shares.keys() <= rows.keys() for leg in legs)
        self._trees = [_tree(leg, seed) for leg in legs]
        self._sources = {name: (i, n, _key(seed, name)) for i, (name, n) in enumerate(rows.items())}

    def __getitem__(self, r: int) -> tuple[int, int]:
        """(place of the source, row of that source) of row `r` of the run."""
        i = self._leg(r)
        leg, node = self.legs[i], self._trees[i]
        m = r - leg.first_row
        while isinstance(node, _Node):
            before, hit = node.smaller(m)
            node, m = (node.small, before) if hit else (node.large, m - before)
        place, rows, key = self._sources[node]
        epoch, k = divmod(leg.drawn.get(node, 0) + m, rows)
        return place, permute(k, rows, _mix(key, epoch))

    def drawn(self, r: int) -> dict[str, int]:
        """Rows of each source before row `r` of the run."""
        i = self._leg(r)
        leg = self.legs[i]
        drawn, rest = {name: leg.drawn.get(name, 0) for name in self.rows}, [(self._trees[i], r - leg.first_row)]
        while rest:
            node, m = rest.pop()
            if isinstance(node, _Node):
                before, _ = node.smaller(m)
                rest += [(node.small, before), (node.large, m - before)]
            else:
                drawn[node] += m
        return drawn

    def taken(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Which rows of each source are rows `first` to `last` - 1 of the run, all at once."""
        before, behind = self.drawn(first), self.drawn(last)
        found = {}
        for name, (_, rows, key) in self._sources.items():
            epochs = range(before[name] // rows, -(-behind[name] // rows))
            parts = [np.arange(max(before[name] - e * rows, 0), min(behind[name] - e * rows, rows)) for e in epochs]
            shuffled = [permute_all(k, rows, _mix(key, e)) for k, e in zip(parts, epochs, strict=True)]
            found[name] = np.concatenate([np.zeros(0, np.uint64), *shuffled])
        return found

    def leg(self, r: int) -> Leg:
        """The leg in which row `r` lies."""
        return self.legs[self._leg(r)]

    def _leg(self, r: int) -> int:
        i = bisect_right(self._firsts, r) - 1
        assert i >= 0, f"row {r} lies before the first leg, which begins at row {self._firsts[0]}"
        return i


class _Node:
    """Two parts of a mixture: which of the node's draws go to the smaller one."""

    def __init__(self, small: "_Node | str", large: "_Node | str", share: Fraction, key: int):
        self.small, self.large = small, large
        self._up, self._period, self._width, self._key = share.numerator, share.denominator, math.ceil(1 / share), key
        self._blocks = -(-self._period // self._width)  # in a period; the last may be shorter
        self._last: tuple[int, int, list[int]] = (-1, 0, [])  # the block that was asked for: most are asked for again

    def smaller(self, m: int) -> tuple[int, bool]:
        """(how many of the first `m` draws go to the smaller part, whether draw `m` does)."""
        period, m = divmod(m, self._period)
        block, place = divmod(m, self._width)
        number = period * self._blocks + block  # of the block in the leg
        known = self._last  # read once: threads share the node
        if known[0] != number:
            known = self._last = self._block(period, block, number)
        _, before, places = known
        for taken in places:
            if taken >= place:
                return before, taken == place
            before += 1
        return before, False

    def _block(self, period: int, block: int, number: int) -> tuple[int, int, list[int]]:
        """(number, draws of the smaller part before the block, their places in it)."""
        begin, end = block * self._width, min((block + 1) * self._width, self._period)
        before, behind = self._before(number, begin), self._before(number + 1, end)
        places: list[int] = []
        for i in range(behind - before):  # at most 3
            place = _mix(self._key + i + 1, number) * (end - begin - i) >> 64
            for taken in places:
                place += place >= taken
            places = sorted([*places, place])
        return number, period * self._up + before, places

    def _before(self, number: int, m: int) -> int:
        """m q, rounded up with the odds of its fraction: the draws of the smaller part before block `number`."""
        return ((m * self._up << 64) + _mix(self._key, number) * self._period) // (self._period << 64)


def _tree(leg: Leg, seed: int) -> _Node | str:
    """The leg's sources joined by Huffman's rule; ties by name, so that it is nothing how they are listed."""
    heap: list[tuple[Fraction, str, _Node | str]] = [(share, name, name) for name, share in leg.shares.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (p, one, small), (q, two, large) = heapq.heappop(heap), heapq.heappop(heap)
        node = _Node(small, large, p / (p + q), _key(seed, leg.first_row, len(heap), one, two))
        heapq.heappush(heap, (p + q, min(one, two), node))
    return heap[0][2]


def _key(*parts: int | str) -> int:
    """64 bits of anything; all bits of an integer count."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little")


def _mix(key: int, n: Any) -> Any:
    """64 bits of draw `n` under `key`: splitmix64; of an array (m,) uint64 of each."""
    x = (key + n * _FIRST) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def permute(k: int, n: int, seed: int) -> int:
    """Where a seeded permutation of 0 ... n - 1 sends `k`; nothing of size n is held.

    A Feistel network over the next even number of bits, applied again while the result is outside; a whole shuffle of
    few, of whose orders the network makes some more often than others.
    """
    assert 0 <= k < n
    if n <= _SMALL:
        return _shuffled(n, seed)[k]
    while (k := _network(k, n, seed)) >= n:
        pass
    return k


def permute_all(k: np.ndarray, n: int, seed: int) -> np.ndarray:
    """`permute` of each of `k` (m,), as uint64 (m,)."""
    if n <= _SMALL:
        return np.array(_shuffled(n, seed), np.uint64)[k]
    k = _network(k.astype(np.uint64), n, seed)
    while (outside := k >= n).any():
        k[outside] = _network(k[outside], n, seed)
    return k


def _network(k: Any, n: int, seed: int) -> Any:
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    left, right = k >> half, k & mask
    for turn in range(_ROUNDS):
        x = (right + ((turn << 32) + seed & _WORD)) * _FIRST & _WORD
        x = ((x ^ (x >> 32)) * _SECOND) & _WORD
        left, right = right, left ^ ((x >> 32) & mask)
    return (left << half) | right


@lru_cache(maxsize=1024)
def _shuffled(n: int, seed: int) -> list[int]:
    return sorted(range(n), key=lambda k: _mix(seed, k))


def hash64(values: np.ndarray, seed: int) -> np.ndarray:
    """64 bits (n,) of each of `values` (n,) uint64, keyed by `seed`, any integer; no two values have the same."""
    return _mix(_key(seed), values)
