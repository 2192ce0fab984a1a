"""The document store: tokenised documents on disk, of which rows of any seed and length are packed.

Each document has a number, of its unit of the input and its place in there. A hash of the number says into which bucket
it goes: no seed, so that one store serves all. To pack a bucket its documents are sorted by a hash of the number and
the seed. Documents that share a row therefore come from one bucket, of some 16 million tokens.

A bucket is a directory of files, one for each process that wrote to it. A file is a sequence of blocks: int64 n,
int64 number of tokens, numbers (n,) uint64, lengths (n,) uint32, bytes of text (n,) uint32, control (n,) uint8, tokens,
and where not all are learned which are, uint8 each.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mixtral_jax.data.prepare.cache import META
from mixtral_jax.data.records import fetched, open_copy
from mixtral_jax.data.rows import hash64
from mixtral_jax.data.text import Documents

BUCKET_BYTES = 64 << 20  # of text
_SPREAD = -1  # the seed of the hash that spreads documents over buckets
_OWN = os.urandom(6).hex()  # of this process's files: containers number their processes alike


def document_numbers(unit: int, first: int, count: int) -> np.ndarray:
    """Numbers (count,) uint64 of the documents of one unit from the place `first` on."""
    return (np.uint64(unit) << np.uint64(32)) + np.arange(first, first + count, dtype=np.uint64)


def append(directory: Path, buckets: int, numbers: np.ndarray, documents: Documents) -> None:
    """Adds documents to their buckets under `directory`."""
    bucket_of = (hash64(numbers, _SPREAD) % np.uint64(buckets)).astype(np.int64)
    for bucket in np.unique(bucket_of).tolist():
        chosen = np.flatnonzero(bucket_of == bucket)
        part = documents.pick(chosen) if len(chosen) < len(numbers) else documents
        path = directory / f"{bucket:06d}" / f"{_OWN}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as stream:
            for column in (
                np.array([len(chosen), len(part.tokens)], np.int64),
                numbers[chosen],
                part.lengths.astype(np.uint32),
                part.text_bytes.astype(np.uint32),
                part.control.astype(np.uint8),
                part.tokens,
                *([] if part.learned is None else [part.learned.astype(np.uint8)]),
            ):
                stream.write(column.tobytes())


def bucket_files(directory: Path, bucket: int) -> list[Path]:
    """The files of a bucket of a store that is whole, which may have to be fetched."""
    listed = json.loads((directory / META).read_bytes())["files"]
    return [directory / name for name in listed if f"/{bucket:06d}/" in name]


def read_bucket(files: Iterable[Path], token_dtype: str, weighted: bool) -> tuple[np.ndarray, Documents]:
    """(numbers, documents) of the files of a bucket, in no order."""
    nothing = tuple(np.zeros(0, dtype) for dtype in (np.uint64, np.uint32, np.uint32, np.uint8, token_dtype, np.uint8))
    blocks = [nothing, *(block for file in files for block in _blocks(file, token_dtype, weighted))]
    columns = list(zip(*blocks, strict=True))
    del blocks
    numbers, lengths, text_bytes, control, tokens, learned = (np.concatenate(columns.pop(0)) for _ in range(6))
    sized = (lengths.astype(np.int64), tokens, learned.view(bool) if weighted else None)
    return numbers, Documents(*sized, text_bytes.astype(np.int64), control.view(bool))


def _blocks(path: Path, token_dtype: str, weighted: bool) -> Iterator[tuple[np.ndarray, ...]]:
    with open_copy(lambda: fetched(path), path) as stream:
        while head := stream.read(16):
            documents, tokens = np.frombuffer(head, np.int64).tolist()
            kinds = (np.uint64, np.uint32, np.uint32, np.uint8)
            yield (
                *(np.fromfile(stream, kind, documents) for kind in kinds),
                np.fromfile(stream, token_dtype, tokens),
                np.fromfile(stream, np.uint8, tokens if weighted else 0),
            )
