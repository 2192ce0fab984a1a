"""The store: everything that goes in comes out, whatever the number of buckets and who wrote it."""

from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.data.prepare import documents
from mixtral_jax.data.rows import hash64
from mixtral_jax.data.text.examples import Documents


def _some(rng: np.random.Generator, weighted: bool) -> Documents:
    lengths = rng.integers(1, 6, 20)
    tokens = rng.integers(0, 60_000, lengths.sum()).astype(np.uint16)
    learned = rng.integers(0, 2, lengths.sum()).astype(bool)
    return Documents(lengths, tokens, learned if weighted else None, 9 * lengths, lengths > 3)


def _each(found: Documents) -> list[tuple[object, ...]]:
    ends = np.cumsum(found.lengths).tolist()
    learned = np.ones(len(found.tokens), bool) if found.learned is None else found.learned
    return [
        (found.tokens[a:b].tolist(), learned[a:b].tolist(), size, control)
        for a, b, size, control in zip(
            [0, *ends[:-1]], ends, found.text_bytes.tolist(), found.control.tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("buckets", [1, 4])
def test_documents_come_out_with_their_numbers(tmp_path: Path, buckets: int, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    expected: dict[int, tuple[object, ...]] = {}
    for unit, part in ((0, "part-1"), (1, "part-1"), (2, "part-2"), (3, "part-2")):
        own = _some(rng, weighted)
        numbers = documents.document_numbers(unit, 5, 20)
        documents.append(tmp_path / part, buckets, numbers, own)
        expected |= dict(zip(numbers.tolist(), _each(own), strict=True))
    assert len(expected) == 80
    seen: dict[int, tuple[object, ...]] = {}
    for bucket in range(buckets):
        numbers, found = documents.read_bucket(tmp_path, bucket, "uint16", weighted)
        seen |= dict(zip(numbers.tolist(), _each(found), strict=True))
        order = rng.permutation(len(numbers))
        assert _each(found.pick(order)) == [_each(found)[i] for i in order]
    assert seen == expected
    on_disk = [sum(f.stat().st_size for f in tmp_path.glob(f"part-*/{b:06d}/*")) for b in range(buckets)]
    assert documents.sizes(tmp_path, buckets) == on_disk


def test_buckets_are_even_and_independent_of_the_order_inside_them() -> None:
    numbers = np.concatenate([documents.document_numbers(unit, 0, 1000) for unit in range(100)])
    bucket_of = (hash64(numbers, documents._SPREAD) % np.uint64(10)).astype(int)
    assert np.abs(np.bincount(bucket_of) - 10_000).max() < 5 * 100  # 5 standard deviations of a uniform choice
    keys = hash64(numbers, 7)
    assert len(np.unique(keys)) == len(keys)
    below = keys < np.uint64(1 << 63)
    assert np.abs(np.bincount(bucket_of[below]) - 5_000).max() < 5 * 71


def test_an_empty_bucket(tmp_path: Path) -> None:
    numbers, found = documents.read_bucket(tmp_path, 0, "uint16", True)
    assert found.learned is not None
    assert len(numbers) == len(found.lengths) == len(found.tokens) == len(found.learned) == 0
