"""The Batch contract: what the data room hands to the training room, in numpy."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """One optimizer step's worth of rows: A micro-batches of b rows of T positions, A leading.

    A is leading so that the scan over micro-batches never reshards the rows.
    """

    tokens: np.ndarray  # (A, b, T) int32
    targets: np.ndarray  # (A, b, T) int32: the token after tokens[..., t]
    weights: np.ndarray  # (A, b, T) float32: weight of the *target*; 0 on padding and across a segment border
    segment_ids: np.ndarray  # (A, b, T) int32: 0 is padding; documents of a row count 1, 2, ...
    positions: np.ndarray  # (A, b, T) int32: restart at 0 in every segment
