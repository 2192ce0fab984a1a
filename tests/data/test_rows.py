"""Stored rows against the slow twin."""

import numpy as np
import pytest

from mixtral_jax.data.rows.row import RowFormat
from tests.oracles import rows as oracle

SHAPES = [[1], [9], [2, 3, 4], [4, 1, 4], [3, 2], [2], [1, 1, 1]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("lengths", SHAPES)
def test_decode_of_encode_is_what_the_model_should_see(lengths: list[int], dtype: str, weighted: bool) -> None:
    rng = np.random.default_rng(sum(lengths))
    layout = RowFormat(8, dtype, weighted)
    pieces = [rng.integers(1, np.iinfo(dtype).max // 2, n).tolist() for n in lengths]
    weights = [rng.integers(0, 3, n).tolist() if weighted else [1] * n for n in lengths]
    flat_weights = np.array([w for of_piece in weights for w in of_piece], np.float32)
    record = layout.encode(np.array(lengths), np.array([t for p in pieces for t in p]), flat_weights)
    row = layout.decode(record)
    for name, expected in oracle.row(pieces, weights, 8).items():
        np.testing.assert_array_equal(getattr(row, name), expected, err_msg=name)
        assert getattr(row, name).dtype == (np.float32 if name == "weights" else np.int32)


def test_a_padding_row_weighs_nothing() -> None:
    row = RowFormat(5, "uint16", False).padding()
    assert all(field.shape == (5,) and not field.any() for field in row)
