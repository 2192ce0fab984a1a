"""Pairs from records to rows: cut together, never split, counted where they are bad."""

import json

import numpy as np
import pytest

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.loader import Loader, RowReader
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.rows.batch import Batch
from mixtral_jax.data.rows.row import pair_row
from mixtral_jax.data.text.chat import Example
from mixtral_jax.data.text.examples import Documents, cut_examples
from mixtral_jax.data.text.tokenizer import load_tokenizer
from tests.tiny import write_byte_tokenizer


def sequence(prompt, answer, first=100):
    return Example([1, *range(10, 9 + prompt), *range(first, first + answer)], [False] * prompt + [True] * answer)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"), [(5, 4, 6), (40, 3, 9), (4, 50, 2), (60, 60, 70), (30, 1, 1)]
)
def test_a_long_pair_is_cut_so_that_both_answers_stay_behind_one_prompt(prompt, chosen, rejected):
    size = 33
    pair = sequence(prompt, chosen), sequence(prompt, rejected, 300)
    lengths = np.array([len(e.tokens) for e in pair])
    tokens, learned = (np.concatenate(column) for column in zip(*pair, strict=True))
    found, _ = cut_examples(Documents(lengths, tokens, learned, lengths, lengths > 0), size, 2)
    split = found.lengths[0]
    fitted = tuple(
        Example(found.tokens[of_it].tolist(), found.learned[of_it].tolist())
        for of_it in (slice(split), slice(split, None))
    )
    assert sum(len(e.tokens) for e in fitted) <= size
    if sum(len(e.tokens) for e in pair) <= size:
        assert fitted == pair
    prompts = [[t for t, w in zip(e.tokens, e.learned, strict=True) if not w] for e in fitted]
    answers = [[t for t, w in zip(e.tokens, e.learned, strict=True) if w] for e in fitted]
    assert prompts[0] == prompts[1] and prompts[0][0] == 1  # BOS
    assert prompts[0][1:] == list(range(10, 9 + prompt))[len(range(10, 9 + prompt)) - len(prompts[0]) + 1 :]
    for kept, count, first in zip(answers, (chosen, rejected), (100, 300), strict=True):
        assert kept == list(range(first, first + len(kept))) and len(kept) >= min(count, size // 4)


def test_numbers_of_a_row_count_each_completion_by_itself():
    segments = np.array([1, 1, 1, 2, 2, 2, 2, 0])
    weights = np.array([0, 1, 0, 1, 0, 1, 0, 0.0])  # the second has two stretches, as a chat of two answers
    row = pair_row(Batch(np.zeros(8), np.zeros(8), weights, segments, np.zeros(8)), pairs=2)
    assert row.completion.tolist() == [0, 1, 0, 1, 0, 2, 0, 0]
    assert row.lengths.tolist() == [[1, 2], [0, 0]] and row.mask.tolist() == [1, 0]
    assert row.weights.tolist() == weights.tolist()


@pytest.fixture
def data(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer.json")

    def make(records, **options):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return DataConfig(
            tokenizer=str(tmp_path / "tokenizer.json"), examples="preference", cache_dir=str(tmp_path / "cache"),
            train=({"name": "pairs", "path": str(path)},), **options,
        )  # fmt: skip

    return make


GOOD = [{"prompt": "q" * (1 + i), "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(9)]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_every_pair_comes_once_with_its_own_partner(data, most):
    config = data(GOOD, pairs_per_row=most)
    source = prepare(config, 80, 0).train[0]
    assert source.documents == 2 * len(GOOD)
    assert source.rows == len(GOOD) if most == 1 else source.rows < len(GOOD)
    reader = RowReader((source,))
    rows = [reader.read(0, r) for r in range(source.rows)]
    found = []
    for row in rows:
        assert row.lengths.shape == (most, 2)
        for k in np.flatnonzero(row.mask):
            sides = [row.targets[(row.segment_ids == 2 * k + s) & (row.completion > 0)] for s in (1, 2)]
            found.append(tuple(tuple(side) for side in sides))
    codec = load_tokenizer(config.tokenizer)
    expected = [tuple((*codec.encode(r[key]), codec.eos_id) for key in ("chosen", "rejected")) for r in GOOD]
    assert sorted(found) == sorted(expected)


def test_bad_pairs_are_errors_with_file_and_line_or_counted(data):
    bad = [*GOOD, {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "", "rejected": "a"}]
    with pytest.raises(ValueError, match=r"jsonl, line 10: 'chosen' and 'rejected' are equal"):
        prepare(data(bad), 80, 0)
    source = prepare(data(bad, on_error="skip"), 80, 0).train[0]
    assert source.bad == 2 and source.documents == 2 * len(GOOD)
    assert any("'chosen' is empty" in text for text in source.bad_examples)
    same = "x" * 60
    long = [*GOOD, {"prompt": "q", "chosen": same + "a", "rejected": same + "b"}]
    prepared = prepare(data(long), 40, 0)
    assert prepared.train[0].dropped == 1 and "1 equal where cut to a row" in prepared.summary()


def test_a_row_too_short_for_pairs_is_refused_before_anything_is_read(data):
    with pytest.raises(ValueError, match="seq_len: a row of 6 is too short for a pair: make it 7 or more"):
        prepare(data(GOOD), 6, 0)


def test_reference_numbers_follow_their_rows(data):
    config = data(GOOD)
    prepared = prepare(config, 80, 0)
    source = prepared.train[0]
    numbers = np.arange(source.rows * 2, dtype=np.float32).reshape(source.rows, 1, 2)
    loader = Loader(prepared, global_batch_size=3, references={source.fingerprint: numbers})
    reader = RowReader((source,))
    rows = [reader.read(0, r) for r in range(source.rows)]
    for _ in range(3):
        batch = next(loader)
        for b in range(3):
            at = int(batch.ref_logps[0, b, 0, 0]) // 2
            np.testing.assert_array_equal(batch.tokens[0, b], rows[at].tokens)
    loader.close()
