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

from mixtral_jax.data.rows import hash64
from mixtral_jax.data.text import Documents

BUCKET_BYTES = 64 << 20  # of text


def document_keys(lump: int, count: int, seed: int) -> np.ndarray:
    """Keys (count,) of the documents of one lump."""
    return hash64((np.uint64(lump) << np.uint64(32)) + np.arange(count, dtype=np.uint64), seed)


def append(directory: Path, buckets: int, keys: np.ndarray, documents: Documents) -> None:
    """Adds documents to their buckets under `directory`."""
    bucket_of = (keys % np.uint64(buckets)).astype(np.int64)
    starts = np.cumsum(documents.lengths) - documents.lengths
    for bucket in np.unique(bucket_of).tolist():
        chosen = np.flatnonzero(bucket_of == bucket)
        part = documents
        if len(chosen) < len(keys):
            part = documents.slices(starts[chosen], documents.lengths[chosen])
        path = directory / f"{bucket:06d}" / f"{os.getpid()}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as stream:
            stream.write(np.array([len(chosen), len(part.tokens)], np.int64).tobytes())
            stream.write(keys[chosen].tobytes() + part.lengths.tobytes() + part.tokens.tobytes())
            if part.weights is not None:
                stream.write(part.weights.astype(np.float16).tobytes())


def read_bucket(directories: list[Path], token_dtype: str, weighted: bool) -> Documents:
    """All documents of a bucket, in the order of their keys."""
    nothing = tuple(np.zeros(0, dtype) for dtype in (np.uint64, np.int64, token_dtype, np.float16))
    files = [file for directory in directories for file in sorted(directory.glob("*.bin"))]
    blocks = [nothing, *(block for file in files for block in _blocks(file, token_dtype, weighted))]
    keys, lengths, tokens, weights = (np.concatenate(column) for column in zip(*blocks, strict=True))
    order = np.argsort(keys, kind="stable")
    starts = np.cumsum(lengths) - lengths
    return Documents(lengths, tokens, weights if weighted else None).slices(starts[order], lengths[order])


def _blocks(path: Path, token_dtype: str, weighted: bool) -> Iterator[tuple[np.ndarray, ...]]:
    with open(path, "rb") as stream:
        while head := stream.read(16):
            documents, tokens = np.frombuffer(head, np.int64).tolist()
            keys = np.fromfile(stream, np.uint64, documents)
            lengths = np.fromfile(stream, np.int64, documents)
            ids = np.fromfile(stream, token_dtype, tokens)
            weights = np.fromfile(stream, np.float16, tokens if weighted else 0)
            yield keys, lengths, ids, weights
