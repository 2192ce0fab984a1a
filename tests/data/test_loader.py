"""Batches: the same rows on any number of hosts, resumed anywhere, and evaluation that counts every token once."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.loader import EvalSource, Loader, RowReader, eval_sources, shard_rows
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.rows.batch import Batch
from mixtral_jax.data.rows.position import Position
from mixtral_jax.data.text.tokenizer import load_tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
TOKENIZER = load_tokenizer(SAMPLES / "tokenizer.model")
SEQ_LEN, ROWS, MICRO = 64, 16, 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _config(cache: Path, weights: tuple[float | None, ...] = (None, None, None), **options: Any) -> DataConfig:
    names = ("fr", "it", "code")
    train = [
        {"name": n, "path": str(SAMPLES / f"{n}.val.jsonl.gz"), "weight": w}
        for n, w in zip(names, weights, strict=True)
    ]
    values = {"tokenizer": str(SAMPLES / "tokenizer.model"), "train": train, "validation": train, "workers": 1}
    return DataConfig(**{**values, "cache_dir": str(cache), **options})


def _batches(config: DataConfig, steps: int, seq_len: int = SEQ_LEN, **options: Any) -> list[Batch]:
    sizes = {"global_batch_size": ROWS, "micro_batch_size": MICRO}
    loader = Loader(prepare(config, seq_len, 0, progress=False), **{**sizes, **options})
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches


def _equal(first: Batch, second: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _joined(shards: list[Batch]) -> Batch:
    """The global batch from each shard's block of each micro-batch."""
    return Batch(*(np.concatenate(parts, axis=1) for parts in zip(*shards, strict=True)))


MIXTURES = {"by size": {}, "weights": {"weights": (5.0, 1.0, 1.0)}, "temperature": {"temperature": 3.0}}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_batches_do_not_depend_on_the_number_of_hosts(cache: Path, mixture: str, hosts: int) -> None:
    config = _config(cache, **MIXTURES[mixture])
    whole = _batches(config, 3)
    shards = [_batches(config, 3, shard=(i, hosts)) for i in range(hosts)]
    for step, batch in enumerate(whole):
        assert batch.tokens.shape == (ROWS // MICRO, MICRO, SEQ_LEN)
        assert shards[0][step].tokens.shape == (ROWS // MICRO, MICRO // hosts, SEQ_LEN)
        assert _equal(_joined([shard[step] for shard in shards]), batch)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_loader_resumes_at_any_row(cache: Path, mixture: str) -> None:
    config = _config(cache, **MIXTURES[mixture])
    whole = _batches(config, 6)
    resumed = _batches(config, 2, start_row=4 * ROWS, shard=(0, 1))
    assert all(_equal(a, b) for a, b in zip(whole[4:], resumed, strict=True))


def test_the_accumulation_only_reshapes_the_step(cache: Path) -> None:
    config = _config(cache)
    one, many = _batches(config, 2, micro_batch_size=None), _batches(config, 2, micro_batch_size=2)
    for a, b in zip(one, many, strict=True):
        assert a.tokens.shape == (1, ROWS, SEQ_LEN)
        assert all(np.array_equal(x[0], y.reshape(x[0].shape)) for x, y in zip(a, b, strict=True))


def test_the_batches_are_the_rows_in_the_global_order(cache: Path) -> None:
    config = _config(cache)
    prepared = prepare(config, SEQ_LEN, 0)
    loader, order = Loader(prepared, global_batch_size=ROWS), prepared.order_from(Position(), ROWS)
    reader = RowReader(prepared.train)
    for step in range(3):
        batch = next(loader)
        places = [order[r] for r in range(step * ROWS, (step + 1) * ROWS)]
        for b, row in enumerate(reader.read(*place) for place in places):
            assert all(np.array_equal(x[0, b], y) for x, y in zip(batch, row, strict=True))
    reader.close()
    loader.close()


def test_a_loader_goes_on_across_phases_from_any_position(cache: Path) -> None:
    values = _config(cache).model_dump()
    phases = [{"from_step": 0, "weights": {"fr": 3, "it": 1}}, {"from_step": 3, "weights": {"code": 1, "fr": 1}}]
    prepared = prepare(DataConfig(**values | {"phases": phases}), SEQ_LEN, 0)
    options = {"global_batch_size": ROWS, "micro_batch_size": MICRO}
    with closing(Loader(prepared, **options)) as loader:
        whole = [next(loader) for _ in range(5)]
    for done in (2, 3, 4):
        position = Position().at(done, done * ROWS, prepared.order_from(Position(), ROWS), prepared.sources)
        order = prepared.order_from(position, ROWS)
        with closing(Loader(prepared, **options, start_row=position.row, order=order)) as loader:
            assert all(_equal(next(loader), batch) for batch in whole[done:])


def test_dtypes_and_the_weights_of_a_batch(cache: Path) -> None:
    (batch,) = _batches(_config(cache, packing="best_fit"), 1, seq_len=512)
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    padding = batch.segment_ids == 0
    assert padding.any()
    assert not batch.weights[padding].any()
    assert not np.any(batch.weights[batch.targets == TOKENIZER.bos_id])
    assert np.all(batch.tokens[batch.weights > 0] != TOKENIZER.eos_id)
    assert np.all(
        batch.targets[..., :-1][batch.weights[..., :-1] > 0] == batch.tokens[..., 1:][batch.weights[..., :-1] > 0]
    )


def test_the_fingerprint_covers_what_the_position_depends_on(cache: Path) -> None:
    def fingerprint(config: DataConfig, seed: int = 0) -> str:
        return prepare(config, SEQ_LEN, seed).fingerprint

    base = fingerprint(_config(cache))
    others = [
        fingerprint(_config(cache), seed=1),
        fingerprint(_config(cache, weights=(5.0, 1.0, 1.0))),
        fingerprint(_config(cache, temperature=3.0)),
        fingerprint(_config(cache, packing="best_fit")),
    ]
    assert len({base, *others}) == 5
    assert fingerprint(_config(cache, epochs=2, restart=True)) == base


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size \(10\) is not a multiple of micro_batch_size \(4\)"):
        shard_rows(10, 4, (0, 1))
    with pytest.raises(ValueError, match=r"micro_batch_size \(4\) is not a multiple of the 3 batch shards"):
        shard_rows(8, 4, (0, 3))


def test_a_host_reads_a_contiguous_block_of_each_micro_batch() -> None:
    assert shard_rows(16, 8, (1, 2)).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert shard_rows(4, 4, (0, 1)).tolist() == [[0, 1, 2, 3]]


# --- evaluation ---


def _evaluation(cache: Path, batch_size: int, **options: Any) -> dict[str, EvalSource]:
    prepared = prepare(_config(cache), SEQ_LEN, 0, train=False)
    return eval_sources(prepared, batch_size=batch_size, **options)


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_evaluation_counts_every_token_once(cache: Path, batch_size: int) -> None:
    sources = _evaluation(cache, batch_size)
    assert list(sources) == ["fr", "it", "code"]
    for name, source in sources.items():
        lines = gzip.decompress((SAMPLES / f"{name}.val.jsonl.gz").read_bytes()).splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        targets: Counter[int] = Counter()
        shapes = set()
        for batch in source:
            shapes.add(batch.tokens.shape)
            targets.update(batch.targets[batch.weights > 0].tolist())
        expected = Counter(t for text in texts for t in [*TOKENIZER.encode(text), TOKENIZER.eos_id])
        assert targets == expected
        assert source.text_bytes == sum(len(text.encode()) for text in texts)
        assert shapes == {(1, batch_size, SEQ_LEN)}
        assert len(list(source)) == len(source)  # it can be read again


def test_evaluation_starts_each_document_at_its_own_bos(cache: Path) -> None:
    source = _evaluation(cache, 8)["fr"]
    longer = 0
    for batch in source:
        first = (batch.positions == 0) & (batch.segment_ids > 0)
        starts = batch.tokens[first]
        longer += np.count_nonzero(starts != TOKENIZER.bos_id)
    lengths = [len(TOKENIZER.encode(t)) + 2 for t in _texts("fr")]
    # A document longer than a row goes on in rows of its own: one more start for each T tokens.
    assert longer == sum(-(-(n - 1) // SEQ_LEN) - 1 for n in lengths)


def _texts(name: str) -> list[str]:
    lines = gzip.decompress((SAMPLES / f"{name}.val.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_evaluation_shards_join_to_the_whole(cache: Path) -> None:
    whole = list(_evaluation(cache, 6)["code"])
    halves = [list(_evaluation(cache, 6, shard=(i, 2))["code"]) for i in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert _equal(_joined(parts), batch)


def test_a_sample_is_spread_over_the_source_and_the_same_for_all(cache: Path) -> None:
    """Packing wrote the longest rows first: the first batches are no picture of the whole."""
    whole, sample = (_evaluation(cache, 4, **options)["fr"] for options in ({}, {"batches": 3}))
    rows = [b.tokens[0, i] for b in whole for i in range(4) if b.segment_ids[0, i].any()]
    batches = list(sample)
    found = np.concatenate([batch.tokens[0] for batch in batches])
    n = len(rows)
    middles = [int((i + 0.5) * n / 12) for i in range(12)]
    assert len(batches) == len(sample) == 3 and all(
        np.array_equal(rows[m], f) for m, f in zip(middles, found, strict=True)
    )
    assert all(_equal(a, b) for a, b in zip(batches, sample, strict=True))
    sizes = prepare(_config(cache), SEQ_LEN, 0, train=False).validation[0].sizes()
    assert sample.text_bytes == sum(int(sizes[m, 1]) for m in middles) < whole.text_bytes == int(sizes[:, 1].sum())
    halves = [list(_evaluation(cache, 4, batches=3, shard=(i, 2))["fr"]) for i in (0, 1)]
    assert all(_equal(_joined(parts), batch) for batch, *parts in zip(batches, *halves, strict=True))
    everything = list(_evaluation(cache, 4, batches=10**6)["fr"])
    assert all(_equal(a, b) for a, b in zip(everything, whole, strict=True))


def test_a_sample_has_short_documents_as_the_whole_has(cache: Path) -> None:
    """Of its first quarter each row was a piece of one long document."""
    source = prepare(_config(cache), 512, 0, train=False).validation[0]

    def documents_a_row(batches: list[Batch]) -> float:
        return float(np.mean([batch.segment_ids.max() for batch in batches]))

    whole, sample = list(EvalSource(source, 1)), list(EvalSource(source, 1, batches=source.rows // 4))
    assert documents_a_row(whole[: source.rows // 4]) == 1 < 1.2 < documents_a_row(whole)
    assert documents_a_row(sample) == pytest.approx(documents_a_row(whole), rel=0.1)


def test_preparing_imports_neither_jax_nor_grain() -> None:
    """A worker of the preparation starts in a fraction of a second."""
    program = (
        "import sys, mixtral_jax.data.prepare.prepared\n"
        "print([m for m in ('jax', 'grain', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
