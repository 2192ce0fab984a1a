"""The stored row: T + 1 tokens of one or more pieces of documents, as one ArrayRecord record.

A record is uint32 n, uint32 length of each of the n pieces, the tokens (uint16 or uint32), and where the data set is
weighted a float16 loss weight for each token. Padding is not stored. Segment ids and positions follow from the
lengths: pieces count 1, 2, ... and positions restart at 0 in each, also where a piece continues a document of an
earlier row (attention cannot see that row).
"""

from dataclasses import dataclass

import numpy as np

from mixtral_jax.data.rows.batch import Batch, PairBatch

WRITER_OPTIONS = "group_size:1,zstd:1"  # group_size 1: a single row can be read without its neighbours


@dataclass(frozen=True)
class RowFormat:
    """What is needed to read a record, besides the record."""

    seq_len: int
    token_dtype: str  # "uint16" or "uint32"
    weighted: bool
    pairs: int = 0  # preference pairs that a row may hold; 0: rows of documents

    def encode(self, lengths: np.ndarray, tokens: np.ndarray, weights: np.ndarray | None) -> bytes:
        """One record. `lengths` (n,), `tokens` and `weights` (sum of lengths,)."""
        head = np.concatenate([[len(lengths)], lengths]).astype(np.uint32)
        record = head.tobytes() + tokens.astype(self.token_dtype, copy=False).tobytes()
        if self.weighted:
            assert weights is not None
            record += weights.astype(np.float16, copy=False).tobytes()
        return record

    def padding(self) -> Batch | PairBatch:
        """A row without anything in it."""
        return self.decode(b"\0" * 4)

    def decode(self, record: bytes) -> Batch | PairBatch:
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
        row = Batch(tokens[:-1], tokens[1:], weights[1:] * inside, segments[:-1], positions[:-1])
        return pair_row(row, self.pairs) if self.pairs else row


def pair_row(row: Batch, pairs: int) -> PairBatch:
    """The row with the numbers of its pairs; `pairs` is K."""
    learned = row.weights > 0
    lengths = np.bincount(row.segment_ids[learned], minlength=2 * pairs + 1)[1:].astype(np.int32)
    before = np.concatenate([[0], np.cumsum(lengths)])  # completion tokens of the segments before
    counted = np.cumsum(learned) - before[np.maximum(row.segment_ids, 1) - 1]
    lengths = lengths.reshape(pairs, 2)
    return PairBatch(
        tokens=row.tokens,
        targets=row.targets,
        completion=np.where(learned, counted, 0).astype(np.int32),
        segment_ids=row.segment_ids,
        positions=row.positions,
        lengths=lengths,
        mask=(lengths.min(axis=1) > 0).astype(np.float32),
        ref_logps=np.zeros((pairs, 2), np.float32),
    )
