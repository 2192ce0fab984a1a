"""New rows of the vocabulary are the mean of the old ones."""

import json

import numpy as np
import pytest

from mixtral_jax.convert import hf2orbax, orbax2hf, resize_vocab
from tests.convert_files import BF16, TINY, assert_same_bytes, random_tensors, read_hub, write_hub


@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_rows_are_added(tmp_path, kind, tied, dtype):
    shape = {**TINY, "tie_word_embeddings": tied}
    tensors = random_tensors(shape, dtype)
    write_hub(tmp_path / "hf", shape, tensors)
    hf2orbax(tmp_path / "hf", tmp_path / "orbax", progress=False)
    resize_vocab(tmp_path / kind, tmp_path / "big", vocab_size=101, progress=False)
    if kind == "orbax":
        orbax2hf(tmp_path / "big", tmp_path / "out", progress=False)
    got = read_hub(tmp_path / ("out" if kind == "orbax" else "big"))
    want = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            mean = tensors[name].astype(np.float64).mean(0).astype(dtype)
            want[name] = np.concatenate([tensors[name], np.tile(mean, (101 - 37, 1))])
    assert_same_bytes(got, want)
    assert json.loads((tmp_path / "big" / "config.json").read_text())["vocab_size"] == 101


def test_rows_are_never_removed(tmp_path):
    write_hub(tmp_path / "hf", TINY, random_tensors(TINY))
    with pytest.raises(ValueError, match="vocab_size 36 is smaller than the 37"):
        resize_vocab(tmp_path / "hf", tmp_path / "small", vocab_size=36, progress=False)
    assert not (tmp_path / "small").exists()
