"""The Batch contract: what the data room hands to the training room, in numpy.

An optimizer step has A micro-batches of b rows of T positions: the shapes below. A is leading, so that the scan over
micro-batches never reshards the rows. The same classes hold a single row, without the axes A and b.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of documents."""

    tokens: np.ndarray  # (A, b, T) int32
    targets: np.ndarray  # (A, b, T) int32: the token after tokens[..., t]
    weights: np.ndarray  # (A, b, T) float32: weight of the *target*; 0 on padding and across a segment border
    segment_ids: np.ndarray  # (A, b, T) int32: 0 is padding; documents of a row count 1, 2, ...
    positions: np.ndarray  # (A, b, T) int32: restart at 0 in every segment


class PairBatch(NamedTuple):
    """Rows of K preference pairs.

    Segment 2k + 1 of a row is the chosen and 2k + 2 the rejected sequence of its pair k; a pair is never split.
    """

    tokens: np.ndarray  # (A, b, T) int32
    targets: np.ndarray  # (A, b, T) int32
    completion: np.ndarray  # (A, b, T) int32: the target is the n-th token of its completion, from 1; 0: none
    segment_ids: np.ndarray  # (A, b, T) int32: 0 is padding
    positions: np.ndarray  # (A, b, T) int32: restart at 0 in every segment
    lengths: np.ndarray  # (A, b, K, 2) int32: completion tokens of chosen and rejected
    mask: np.ndarray  # (A, b, K) float32: 1 for a pair, 0 for filling
    ref_logps: np.ndarray  # (A, b, K, 2) float32: log-probabilities of the reference; 0 until one is asked

    @property
    def weights(self) -> np.ndarray:
        """(A, b, T) float32: 1 where the target belongs to a completion."""
        return (self.completion > 0).astype(np.float32)
