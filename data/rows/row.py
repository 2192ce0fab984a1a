"""The stored row: T + 1 tokens of one or more pieces of documents, as one ArrayRecord record.

A record is uint32 n, uint32 length of each of the n pieces, the tokens (uint16 or uint32), and where the data set is
weighted a float16 loss weight for each token. Padding is not stored. Segment ids and positions follow from the
lengths: pieces count 1, 2, ... and positions restart at 0 in each, also where a piece continues a document of an
earlier row (attention cannot see that row).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixtral_jax.data.rows.pairs import PairRow, pair_row

WRITER_OPTIONS = "group_size:1,zstd:1"  # group_size 1: a single row can be read without its neighbours


class Row(NamedTuple):
    """One row as the model sees it: T inputs and the T tokens after them."""

    tokens: np.ndarray  # (T,) int32
    targets: np.ndarray  # (T,) int32
    weights: np.ndarray  # (T,) float32, of the target
    segment_ids: np.ndarray  # (T,) int32, 0 is padding
    positions: np.ndarray  # (T,) int32


@dataclass(frozen=True)
class RowFormat:
    """What is needed to read a record, besides the record."""

    seq_len: int
    token_dtype: str  # "uint16" or "uint32"
    weighted: bool
    pairs: int = 0  # preference pairs that a row may hold; 0: rows of documents

    def encode(self, lengths: np.ndarray, tokens: np.ndarray, weights: np.ndarray | None) -> bytes:
        """One record. `lengths` (n,), `tokens` and `weights` (sum of lengths,)."""
        head = np.empty(len(lengths) + 1, np.uint32)
        head[0], head[1:] = len(lengths), lengths
        record = head.tobytes() + tokens.astype(self.token_dtype, copy=False).tobytes()
        if self.weighted:
            assert weights is not None
            record += weights.astype(np.float16, copy=False).tobytes()
        return record

    def padding(self) -> Row | PairRow:
        """A row without anything in it."""
        return self.decode(b"\0" * 4)

    def decode(self, record: bytes) -> Row | PairRow:
        """The row of a record. A target across a segment border, or in the padding, has weight 0."""
        n = int(np.frombuffer(record, np.uint32, 1)[0])
        lengths = np.frombuffer(record, np.uint32, n, offset=4).astype(np.int64)
        used, offset = int(lengths.sum()), 4 * (n + 1)
        size = self.seq_len + 1
        tokens, segments, positions = (np.zeros(size, np.int32) for _ in range(3))
        weights = np.zeros(size, np.float32)
        tokens[:used] = np.frombuffer(record, self.token_dtype, used, offset=offset)
        segments[:used] = np.repeat(np.arange(1, n + 1), lengths)
        positions[:used] = np.arange(used) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        if self.weighted:
            after = offset + used * np.dtype(self.token_dtype).itemsize
            weights[:used] = np.frombuffer(record, np.float16, used, offset=after)
        else:
            weights[:used] = 1
        inside = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        row = Row(tokens[:-1], tokens[1:], weights[1:] * inside, segments[:-1], positions[:-1])
        return pair_row(*row, pairs=self.pairs) if self.pairs else row
