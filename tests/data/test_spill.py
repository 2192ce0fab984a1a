"""Buckets: everything that goes in comes out, in the order of the keys."""

from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.data.prepare import spill
from mixtral_jax.data.text.examples import Documents


def test_keys_are_seeded_spread_and_never_equal() -> None:
    keys = np.concatenate([spill.document_keys(lump, 1000, 7) for lump in range(100)])
    assert len(np.unique(keys)) == len(keys)
    assert not np.any(keys[:1000] == spill.document_keys(0, 1000, 8))
    counts = np.bincount((keys % np.uint64(10)).astype(int))
    assert np.abs(counts - 10_000).max() < 5 * 100  # 5 standard deviations of a uniform choice
    bits = np.unpackbits(keys.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.01


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("buckets", [1, 4])
def test_documents_come_out_sorted_by_key(tmp_path: Path, buckets: int, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    documents: dict[int, tuple[list[int], list[float]]] = {}
    for lump, part in ((0, "a"), (1, "a"), (2, "b"), (3, "b")):
        lengths = rng.integers(1, 6, 20)
        tokens = rng.integers(0, 60_000, lengths.sum()).astype(np.uint16)
        weights = rng.integers(0, 2, lengths.sum()).astype(np.float16)
        keys = spill.document_keys(lump, 20, 1)
        spill.append(tmp_path / part, buckets, keys, Documents(lengths, tokens, weights if weighted else None))
        ends = np.cumsum(lengths)
        for key, start, end in zip(keys.tolist(), ends - lengths, ends, strict=True):
            documents[key] = (tokens[start:end].tolist(), weights[start:end].tolist())
    seen = 0
    for bucket in range(buckets):
        directories = [tmp_path / part / f"{bucket:06d}" for part in "ab"]
        lengths, tokens, weights = spill.read_bucket(directories, "uint16", weighted)
        expected = [documents[key] for key in sorted(documents) if key % buckets == bucket]
        assert lengths.tolist() == [len(d) for d, _ in expected]
        assert tokens.tolist() == [t for d, _ in expected for t in d]
        if weighted:
            assert weights is not None
            assert weights.tolist() == [w for _, of_document in expected for w in of_document]
        else:
            assert weights is None
        seen += len(lengths)
    assert seen == len(documents) == 80


def test_an_empty_bucket(tmp_path: Path) -> None:
    lengths, tokens, weights = spill.read_bucket([tmp_path], "uint16", True)
    assert weights is not None
    assert len(lengths) == len(tokens) == len(weights) == 0
