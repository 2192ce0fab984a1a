"""Which row of which source is row r of the run: a pure function of r, so that the position in the data is r alone."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_PERIOD = 1 << 16
_ROUNDS = 4
_FIRST, _SECOND, _WORD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, (1 << 64) - 1


def shares(rows: Sequence[int], weights: Sequence[float | None], temperature: float | None) -> list[float] | None:
    """Shares of the sources, summing to 1; None where all rows are drawn equally often.

    With weights alone p_i = w_i / sum(w). With a temperature p_i is in proportion to (w_i n_i)^(1 / temperature),
    n_i the rows and w_i 1 where not given: above 1 it draws small sources more often than their size.
    """
    if temperature is not None:
        scores = [((w or 1.0) * n) ** (1 / temperature) for w, n in zip(weights, rows, strict=True)]
    elif weights[0] is not None:
        scores = [float(w or 0) for w in weights]
    else:
        return None
    return [score / sum(scores) for score in scores]


class GlobalOrder:
    """The endless sequence of rows of a mixture.

    Without shares the sources are one set: every epoch is a fresh permutation of all rows, each exactly once. With
    shares a pattern of 65,536 places, in which each source is spread evenly, says which source comes next; each
    source runs through its own permutations, so that none of its rows comes twice before all came once.
    """

    def __init__(self, rows: Sequence[int], parts: Sequence[float] | None, seed: int):
        if not rows or min(rows) < 1:
            raise ValueError(f"every source needs at least one row, found {list(rows)}")
        self.rows, self.seed, self.shares = list(rows), seed, parts
        self.total = sum(rows)
        self._starts = np.concatenate([[0], np.cumsum(rows)])
        self._pattern = self._rank = None
        if parts is not None:
            self._pattern, self._rank = _pattern(parts)
            self._per_period = np.bincount(self._pattern, minlength=len(rows))

    def __getitem__(self, r: int) -> tuple[int, int]:
        """(source, row of that source) of row `r` of the run."""
        if self._pattern is None or self._rank is None:
            epoch, k = divmod(r, self.total)
            k = permute(k, self.total, _mix(self.seed, 0, epoch))
            source = bisect_right(self._starts, k) - 1
            return source, int(k - self._starts[source])
        period, place = divmod(r, _PERIOD)
        source = int(self._pattern[place])
        drawn = period * int(self._per_period[source]) + int(self._rank[place])
        epoch, k = divmod(drawn, self.rows[source])
        return source, permute(k, self.rows[source], _mix(self.seed, source + 1, epoch))


def _pattern(parts: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(source, how many of that source came before) for each place of a period; every source has a place."""
    exact = np.asarray(parts) * (_PERIOD - len(parts))
    counts = np.floor(exact).astype(np.int64) + 1
    for i in np.argsort(np.floor(exact) - exact, kind="stable")[: _PERIOD - counts.sum()]:
        counts[i] += 1
    sources = np.repeat(np.arange(len(parts)), counts)
    ranks = np.concatenate([np.arange(n) for n in counts])
    # The k-th of n rows of a source sits at (k + 1/2) / n of the period.
    order = np.argsort((ranks + 0.5) / counts[sources], kind="stable")
    return sources[order], ranks[order]


@lru_cache(maxsize=256)
def _mix(seed: int, stream: int, epoch: int) -> int:
    """A 64-bit seed for one permutation."""
    return int(hash64(np.array([(epoch << 16) + stream], np.uint64), seed)[0])


def permute(k: int, n: int, seed: int) -> int:
    """Where a seeded permutation of 0 ... n - 1 sends `k`; nothing of size n is held.

    A Feistel network over the next even number of bits, applied again while the result is outside.
    """
    assert 0 <= k < n
    half = max(1, (max(1, (n - 1).bit_length()) + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = k >> half, k & mask
        for turn in range(_ROUNDS):
            x = (right + (turn << 32) + seed) * _FIRST & _WORD
            x = ((x ^ (x >> 32)) * _SECOND) & _WORD
            left, right = right, left ^ ((x >> 32) & mask)
        k = (left << half) | right
        if k < n:
            return k


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(values: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of `values` (n,) uint64, keyed by `seed`, any integer."""
    if not 0 <= seed <= _WORD:  # all bits of a longer one count
        seed = int.from_bytes(hashlib.sha256(hex(seed).encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64((seed * 0xD1342543DE82EF95 + 1) % (1 << 64)) * _GOLDEN
        for _ in range(2):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = (x ^ (x >> np.uint64(31))) + _GOLDEN
    return x
