"""Documents into rows of T + 1 tokens.

Both packings keep the same promise: every token of a document except its first is a target exactly once. A document
that does not fit is continued in another row from the last token of the piece before, so that this token is an input
there and a target here.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """Which slice of the token stream goes into which row; sorted by row."""

    row: np.ndarray  # (n,) int64
    start: np.ndarray  # (n,) int64, first token in the stream
    length: np.ndarray  # (n,) int64
    rows: int  # number of rows
    split: int  # documents in more than one piece


def _pieces(found: Iterable[tuple[int, int, int]], rows: int, split: int) -> Pieces:
    table = np.array(list(found), np.int64).reshape(-1, 3)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Pieces(table[:, 0], table[:, 1], table[:, 2], rows, split)


def _cut(start: int, length: int, first: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the pieces of a document: at most `first` tokens, then at most `size`."""
    while length > first:
        yield start, first
        start, length, first = start + first - 1, length - first + 1, size
    yield start, length


def concat(lengths: np.ndarray, seq_len: int) -> Pieces:
    """Lays documents end to end and cuts at row ends. `lengths` (n,): tokens of each document, at least 2.

    A document is not begun in the last place of a row: there its first token would neither predict nor be predicted.
    """
    size = seq_len + 1
    found: list[tuple[int, int, int]] = []
    row, space, start, split = 0, size, 0, 0
    for length in lengths.tolist():
        if space < 2:
            row, space = row + 1, size
        pieces = list(_cut(start, length, space, size))
        found += [(row + i, *piece) for i, piece in enumerate(pieces)]
        if len(pieces) > 1:
            row, space, split = row + len(pieces) - 1, size, split + 1
        space -= pieces[-1][1]
        start += length
    return _pieces(found, row + 1 if found else 0, split)


def best_fit(lengths: np.ndarray, seq_len: int, most: int | None = None) -> Pieces:
    """Best-fit decreasing: each document goes into the row with the least room that still holds it.

    A row takes at most `most` documents. Only documents longer than T + 1 are split, into full rows and a rest.
    Longest first; among equal documents the earlier one first, among rows with equal room the lowest row.
    """
    size = seq_len + 1
    items: list[tuple[int, int]] = []  # (start, length), each at most a row
    start, split = 0, 0
    for length in lengths.tolist():
        items += _cut(start, length, size, size)
        split += length > size
        start += length
    items.sort(key=lambda item: -item[1])
    found: list[tuple[int, int, int]] = []
    rows_with: dict[int, list[int]] = {}  # room left -> heap of rows
    rooms: list[int] = []  # the keys of rows_with, ascending
    rows = 0
    counts: list[int] = []  # documents in each row
    for at, length in items:
        k = bisect_left(rooms, length)
        if k == len(rooms):
            row, room = rows, size
            rows += 1
            counts.append(0)
        else:
            room = rooms[k]
            row = heappop(rows_with[room])
            if not rows_with[room]:
                del rows_with[room], rooms[k]
        found.append((row, at, length))
        room -= length
        counts[row] += 1
        if room >= 2 and counts[row] != most:
            if room not in rows_with:
                rows_with[room] = []
                insort(rooms, room)
            heappush(rows_with[room], row)
    return _pieces(found, rows, split)


def pair_pieces(lengths: np.ndarray, seq_len: int, most: int) -> Pieces:
    """Packs pairs as wholes, at most `most` to a row; each of their two sequences is a piece.

    `lengths` (2n,): chosen and rejected of each pair in turn; together they fit a row.
    """
    first, both = lengths[::2], lengths.reshape(-1, 2).sum(axis=1)
    pairs = best_fit(both, seq_len, most)
    own = first[np.searchsorted(np.cumsum(both) - both, pairs.start)]
    start = np.stack([pairs.start, pairs.start + own], axis=1).reshape(-1)
    length = np.stack([own, pairs.length - own], axis=1).reshape(-1)
    return Pieces(pairs.row.repeat(2), start, length, pairs.rows, pairs.split)


PACKINGS = {"concat": concat, "best_fit": best_fit}
