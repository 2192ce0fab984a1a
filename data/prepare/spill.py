"""Tokenised documents on their way to rows: a shuffle of any size in bounded memory.

Each document gets a 64-bit key, a hash of the seed and of its number. The key says into which bucket the document
goes, and inside a bucket documents are sorted by key. That is a uniform shuffle of the whole source, and the result
depends neither on the number of workers nor on who was first.

A bucket is a directory of files, one for each process that wrote to it. A file is a sequence of blocks: int64 n,
int64 number of tokens, keys (n,) uint64, lengths (n,) int64, tokens, and the float16 weights of a weighted data set.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixtral_jax.data.rows.order import hash64

BUCKET_BYTES = 64 << 20  # of text


def document_keys(lump: int, count: int, seed: int) -> np.ndarray:
    """Keys (count,) of the documents of one lump."""
    return hash64((np.uint64(lump) << np.uint64(32)) + np.arange(count, dtype=np.uint64), seed)


def append(
    directory: Path,
    buckets: int,
    keys: np.ndarray,
    lengths: np.ndarray,
    tokens: np.ndarray,
    weights: np.ndarray | None,
) -> None:
    """Adds documents to their buckets under `directory`."""
    bucket_of = (keys % np.uint64(buckets)).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    for bucket in np.unique(bucket_of).tolist():
        chosen = np.flatnonzero(bucket_of == bucket)
        if len(chosen) == len(keys):
            part, part_weights = tokens, weights
        else:
            part = gather(tokens, starts[chosen], lengths[chosen])
            part_weights = None if weights is None else gather(weights, starts[chosen], lengths[chosen])
        path = directory / f"{bucket:06d}" / f"{os.getpid()}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as stream:
            stream.write(np.array([len(chosen), len(part)], np.int64).tobytes())
            stream.write(keys[chosen].tobytes() + lengths[chosen].tobytes() + part.tobytes())
            if part_weights is not None:
                stream.write(part_weights.astype(np.float16).tobytes())


def gather(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The slices tokens[start : start + length], end to end."""
    slices = [tokens[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    return np.concatenate(slices) if slices else tokens[:0]


def read_bucket(
    directories: list[Path], token_dtype: str, weighted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(lengths, tokens, weights) of all documents of a bucket, in the order of their keys."""
    blocks = [b for d in directories for f in sorted(d.glob("*.bin")) for b in _blocks(f, token_dtype, weighted)]
    if not blocks:
        return np.zeros(0, np.int64), np.zeros(0, token_dtype), np.zeros(0, np.float16) if weighted else None
    keys, lengths, tokens = (np.concatenate([b[i] for b in blocks]) for i in range(3))
    order = np.argsort(keys, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[order]
    weights = None
    if weighted:
        weights = gather(np.concatenate([b[3] for b in blocks]), starts, lengths[order])
    return lengths[order], gather(tokens, starts, lengths[order]), weights


def _blocks(path: Path, token_dtype: str, weighted: bool) -> Iterator[tuple[np.ndarray, ...]]:
    with open(path, "rb") as stream:
        while head := stream.read(16):
            documents, tokens = np.frombuffer(head, np.int64).tolist()
            keys = np.fromfile(stream, np.uint64, documents)
            lengths = np.fromfile(stream, np.int64, documents)
            ids = np.fromfile(stream, token_dtype, tokens)
            weights = np.fromfile(stream, np.float16, tokens if weighted else 0)
            yield keys, lengths, ids, weights
