"""The beginning of a source, to look at a model by."""

import json

import numpy as np
import pytest

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import first_documents
from mixtral_jax.data.text import load_template, load_tokenizer
from tests.tiny import write_byte_tokenizer


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (100, [5, 5, 3, 5] + [5] * 16 + [2]),  # a twentieth of each, where it has that
        (400, [20, 20, 3, 20] + [20] * 16 + [17]),
        (1800, [102, 83, 3, 602] + [41] * 24 + [26]),  # the longest give more, since there are not enough others
        (9999, [102, 83, 3, 602] + [41] * 30),
    ],
)
def test_many_documents_rather_than_long_ones(tmp_path, tokens, wanted):
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    lengths = [100, 81, 1, 600] + [39] * 30
    lines = [json.dumps({"text": "x" * n}) for n in lengths]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:3]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[3:]))
    source = SourceConfig(name="x", path=str(tmp_path / "*.jsonl"))
    config = DataConfig(tokenizer="", train=(source,))
    found = first_documents(config, source, tokenizer, tokens)
    whole = [np.array([tokenizer.bos_id, *tokenizer.encode("x" * n), tokenizer.eos_id]) for n in lengths]
    for ids, document in zip(found, whole, strict=False):
        np.testing.assert_array_equal(ids, document[: len(ids)])
    assert sum(map(len, found)) == min(tokens, sum(map(len, whole)))
    assert [len(ids) for ids in found] == wanted


def test_chats_are_whole_with_their_template(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    source = SourceConfig(name="x", path=str(tmp_path / "chats.jsonl"))
    config = DataConfig(tokenizer="", train=(source,), examples="chat")
    (ids,) = first_documents(config, source, load_template("v1", tokenizer), 100)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids[1:-1].tolist()).replace(" ", "") == "[INST]a[/INST]b"
