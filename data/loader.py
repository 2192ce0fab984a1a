"""Rows on disk into batches: mixed, shuffled, prefetched, and this process's share of them only."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np

from mixtral_jax.data.prepare import PreparedData, PreparedSource
from mixtral_jax.data.reader import References, RowReader
from mixtral_jax.data.rows import Batch, GlobalOrder, PairBatch, Position

_THREADS = 2
_AHEAD = 4  # batches
_ENDLESS = 1 << 40  # steps


def shard_rows(global_batch_size: int, micro_batch_size: int, shard: tuple[int, int]) -> np.ndarray:
    """(A, b) places in a step of the rows of `shard` (i, n): of each micro-batch the i-th contiguous n-th."""
    index, count = shard
    assert 0 <= index < count
    if global_batch_size % micro_batch_size:
        raise ValueError(
            f"global_batch_size ({global_batch_size}) is not a multiple of micro_batch_size ({micro_batch_size})"
        )
    if micro_batch_size % count:
        raise ValueError(f"micro_batch_size ({micro_batch_size}) is not a multiple of the {count} batch shards")
    return np.arange(global_batch_size).reshape(-1, count, micro_batch_size // count)[:, index]


def stack(rows: Sequence[Batch | PairBatch], accumulation: int) -> Batch | PairBatch:
    """Rows into a batch of `accumulation` micro-batches."""
    fields = (np.stack(field) for field in zip(*rows, strict=True))
    return type(rows[0])(*(x.reshape(accumulation, -1, *x.shape[1:]) for x in fields))


class Loader:
    """Endless batches of the training sources from a global row on, which is all that there is to save of a position.

    Row r of the global order belongs to step r // global_batch_size; inside a step micro-batch a has rows
    a * micro_batch_size and on, of which this process reads its shard.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self, prepared: PreparedData, *, global_batch_size: int, micro_batch_size: int | None = None,
        shard: tuple[int, int] = (0, 1), start_row: int = 0, order: GlobalOrder | None = None,
        references: References | None = None,
    ):  # fmt: skip
        """`order` is the one from the run's beginning where it is not given."""
        self._reader = reader = RowReader(prepared.train, references)
        order = order or prepared.order_from(Position(), global_batch_size)
        places = shard_rows(global_batch_size, micro_batch_size or global_batch_size, shard)

        def batch(step: int) -> Batch | PairBatch:
            wanted = (start_row + step * global_batch_size + places).flatten().tolist()
            return stack([reader.read(*order[r]) for r in wanted], len(places))

        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        self._batches = iter(grain.MapDataset.range(_ENDLESS).map(batch).to_iter_dataset(options))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch | PairBatch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the reading threads and closes the files."""
        self._batches.close()
        self._reader.close()


class EvalSource:
    """The validation text of one source, as batches of one micro-batch (A = 1); can be iterated again.

    With `batches` a sample of so many: rows evenly spaced (packing wrote the longest first), the same for every
    shard and at every time. `text_bytes` is what its nats are divided by for bits per byte (NUMERICS D7); 0: no text is
    predicted as a whole.
    """

    def __init__(
        self, source: PreparedSource, batch_size: int, shard: tuple[int, int] = (0, 1), *, batches: int | None = None,
        references: References | None = None,
    ):  # fmt: skip
        self.fingerprint = source.fingerprint
        n = source.rows if batches is None else min(source.rows, batches * batch_size)
        self._rows = [(2 * i + 1) * source.rows // (2 * n) for i in range(n)]  # the middle of each n-th
        self.text_bytes = 0 if source.format.weighted else int(source.sizes()[self._rows, 1].sum(dtype=np.int64))
        self._padding, self._batch_size = source.format.padding(), batch_size
        self._reader = RowReader([source], references)
        self._places = shard_rows(batch_size, batch_size, shard)[0]

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch | PairBatch]:
        return (self.batch(step) for step in range(len(self)))

    def batch(self, step: int) -> Batch | PairBatch:
        """One batch by its number; rows behind the last are padding."""
        wanted, rows = (step * self._batch_size + self._places).tolist(), self._rows
        return stack([self._reader.read(0, rows[i]) if i < len(rows) else self._padding for i in wanted], 1)


def eval_sources(prepared: PreparedData, **options: Any) -> dict[str, EvalSource]:
    """Each validation source by name, with the options of `EvalSource`.

    Every token but BOS is a target exactly once; the last batch is padded.
    """
    return {source.name: EvalSource(source, **options) for source in prepared.validation}
