"""Rows on disk into batches: mixed, shuffled, prefetched, and this process's share of them only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Self

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from mixtral_jax.data.prepare.cache import PreparedSource
from mixtral_jax.data.prepare.prepare import PreparedData
from mixtral_jax.data.rows.batch import Batch, PairBatch

_THREADS = 2
_AHEAD = 4  # batches
_ENDLESS = 1 << 40  # steps

References = Mapping[str, np.ndarray]  # fingerprint of a source -> (rows, K, 2) log-probabilities of the reference


class RowReader:
    """Random access to the rows of prepared sources; pairs with their reference log-probabilities where known."""

    def __init__(self, sources: Sequence[PreparedSource], references: References | None = None):
        self._sources, self._references = sources, references or {}
        self._records = [  # with the numbers of rows no file is opened before one of its rows is asked for
            ArrayRecordDataSource(
                [f"{path}[0:{rows}]" for path, (_, rows, _) in zip(source.paths, source.shards, strict=True)]
            )
            for source in sources
        ]

    def read(self, source: int, row: int) -> Batch | PairBatch:
        """One row."""
        found = self._sources[source].format.decode(self._records[source][row])
        known = self._references.get(self._sources[source].fingerprint)
        if known is None or isinstance(found, Batch):
            return found
        return found._replace(ref_logps=known[row])

    def close(self) -> None:
        """Closes the files."""
        for records in self._records:
            records.__exit__(None, None, None)


@dataclass(frozen=True)
class BatchLayout:
    """How rows are laid out in batches: global sizes, and which share of each micro-batch is ours."""

    global_batch_size: int
    micro_batch_size: int
    shard: tuple[int, int]

    def __post_init__(self) -> None:
        index, count = self.shard
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) is not a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        if self.micro_batch_size % count:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) is not a multiple of the {count} batch shards"
            )
        assert 0 <= index < count

    @property
    def accumulation(self) -> int:
        """A, the number of micro-batches."""
        return self.global_batch_size // self.micro_batch_size

    def rows(self, start: int) -> list[int]:
        """Global rows of this shard in the step that begins at row `start`: of each micro-batch a contiguous block."""
        index, count = self.shard
        local = self.micro_batch_size // count
        firsts = range(start + index * local, start + self.global_batch_size, self.micro_batch_size)
        return [first + j for first in firsts for j in range(local)]


def stack(rows: Sequence[Batch | PairBatch], accumulation: int) -> Batch | PairBatch:
    """Rows into a Batch of `accumulation` micro-batches."""
    fields = (np.stack(field) for field in zip(*rows, strict=True))
    kind = PairBatch if isinstance(rows[0], PairBatch) else Batch
    return kind(*(x.reshape(accumulation, -1, *x.shape[1:]) for x in fields))


class Loader:
    """Endless batches of the training sources. `next_row` is the whole state: the first global row not handed out yet.

    Row r of the global order belongs to step r // global_batch_size; inside a step micro-batch a has rows
    a * micro_batch_size and on, of which `shard` (i, n) takes the i-th contiguous n-th.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        prepared: PreparedData,
        *,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        shard: tuple[int, int] = (0, 1),
        start_row: int = 0,
        references: References | None = None,
    ):
        self.next_row = start_row
        self._layout = layout = BatchLayout(global_batch_size, micro_batch_size or global_batch_size, shard)
        self._reader = reader = RowReader(prepared.train, references)
        order = prepared.order

        def batch(step: int) -> Batch | PairBatch:
            wanted = layout.rows(start_row + step * global_batch_size)
            return stack([reader.read(*order[r]) for r in wanted], layout.accumulation)

        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        self._batches = iter(grain.MapDataset.range(_ENDLESS).map(batch).to_iter_dataset(options))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch | PairBatch:
        batch = next(self._batches)
        self.next_row += self._layout.global_batch_size
        return batch

    def close(self) -> None:
        """Ends the reading threads and closes the files."""
        self._batches.close()
        self._reader.close()


class EvalSource:
    """The whole validation text of one source, as batches of one micro-batch (A = 1); can be iterated again.

    `text_bytes` is what its nats are divided by for bits per byte (NUMERICS D7); 0: no text is predicted as a whole.
    """

    def __init__(
        self,
        source: PreparedSource,
        batch_size: int,
        shard: tuple[int, int] = (0, 1),
        references: References | None = None,
    ):
        self.targets, self.fingerprint = source.targets, source.fingerprint
        self.text_bytes = 0 if source.format.weighted else source.text_bytes
        self._source, self._references = source, references
        self._layout = BatchLayout(batch_size, batch_size, shard)

    def __len__(self) -> int:
        return -(-self._source.rows // self._layout.global_batch_size)

    def __iter__(self) -> Iterator[Batch | PairBatch]:
        return (self.batch(step) for step in range(len(self)))

    def batch(self, step: int) -> Batch | PairBatch:
        """One batch by its number; rows behind the last are padding."""
        wanted = self._layout.rows(step * self._layout.global_batch_size)
        with closing(RowReader((self._source,), self._references)) as reader:
            rows = [reader.read(0, r) for r in wanted if r < self._source.rows]
        return stack(rows + [self._source.format.padding()] * (len(wanted) - len(rows)), 1)


def eval_sources(
    prepared: PreparedData,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    references: References | None = None,
) -> dict[str, EvalSource]:
    """Each validation source by name. Every token but BOS is a target exactly once; the last batch is padded."""
    return {source.name: EvalSource(source, batch_size, shard, references) for source in prepared.validation}
