"""Packing against slow twins, and the promise that each token but the first of a document is a target once."""

from itertools import pairwise

import numpy as np
import pytest

from mixtral_jax.data.rows.packing import PACKINGS, Pieces
from tests.oracles import packing as oracle

TWINS = {"concat": oracle.concat, "best_fit": oracle.best_fit}
CASES = [(seed, seq_len) for seed in range(6) for seq_len in (1, 2, 7, 16, 33)]


def _documents(seed: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, size=60)
    ids = iter(range(100_000))
    return [[next(ids) for _ in range(n)] for n in lengths]


def _rows(pieces: Pieces, stream: list[int]) -> list[list[list[int]]]:
    rows: list[list[list[int]]] = [[] for _ in range(pieces.rows)]
    for row, start, length in zip(*(x.tolist() for x in pieces[:3]), strict=True):
        rows[row].append(stream[start : start + length])
    return rows


def _pack(kind: str, documents: list[list[int]], seq_len: int) -> tuple[Pieces, list[list[list[int]]]]:
    pieces = PACKINGS[kind](np.array([len(d) for d in documents], np.int64), seq_len)
    return pieces, _rows(pieces, [t for d in documents for t in d])


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize(("seed", "seq_len"), CASES)
def test_equals_the_slow_twin(kind: str, seed: int, seq_len: int) -> None:
    documents = _documents(seed, 40)
    _, rows = _pack(kind, documents, seq_len)
    assert rows == TWINS[kind](documents, seq_len)


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize(("seed", "seq_len"), CASES)
def test_each_token_but_the_first_is_a_target_once(kind: str, seed: int, seq_len: int) -> None:
    documents = _documents(seed, 40)
    pieces, rows = _pack(kind, documents, seq_len)
    pairs = [pair for row in rows for piece in row for pair in pairwise(piece)]
    assert sorted(pairs) == sorted(pair for d in documents for pair in pairwise(d))
    assert max(sum(map(len, row)) for row in rows) <= seq_len + 1
    assert all(row for row in rows)
    owner = {token: i for i, d in enumerate(documents) for token in d}
    parts = np.bincount([owner[piece[-1]] for row in rows for piece in row], minlength=len(documents))
    assert pieces.split == np.count_nonzero(parts > 1)


def test_best_fit_splits_only_what_is_longer_than_a_row() -> None:
    pieces = PACKINGS["best_fit"](np.array([17, 18, 5, 17, 9]), 16)
    assert pieces.split == 1
    assert sorted(pieces.length.tolist()) == [2, 5, 9, 17, 17, 17]
    assert pieces.rows == 4  # three full rows, and 9 + 5 + 2 in the last


def test_concat_leaves_a_last_place_empty_rather_than_start_a_document_there() -> None:
    pieces = PACKINGS["concat"](np.array([8, 4]), 8)
    assert pieces.row.tolist() == [0, 1]
    assert pieces.length.tolist() == [8, 4]


@pytest.mark.parametrize("kind", PACKINGS)
def test_nothing_gives_nothing(kind: str) -> None:
    pieces = PACKINGS[kind](np.zeros(0, np.int64), 8)
    assert (pieces.rows, pieces.split, len(pieces.row)) == (0, 0, 0)
