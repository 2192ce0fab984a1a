"""Rows on disk into batches: mixed, shuffled, prefetched, and this process's share of them only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare.cache import PreparedSource, digest
from mixtral_jax.data.prepare.prepare import prepare
from mixtral_jax.data.progress import say
from mixtral_jax.data.rows.batch import Batch, PairBatch
from mixtral_jax.data.rows.order import GlobalOrder, shares
from mixtral_jax.data.rows.pairs import PairRow
from mixtral_jax.data.rows.row import Row

_THREADS = 2
_AHEAD = 4  # batches

References = Mapping[str, np.ndarray]  # fingerprint of a source -> (rows, K, 2) log-probabilities of the reference


class Rows:
    """Random access to the rows of prepared sources; pairs with their reference log-probabilities where known."""

    def __init__(self, sources: tuple[PreparedSource, ...], references: References | None = None):
        self.sources, self.references = sources, references or {}
        self._readers: dict[tuple[int, int], ArrayRecordReader] = {}  # opened when first asked for
        self._starts = [np.cumsum([0, *(rows for _, rows, _ in s.shards)]) for s in sources]

    def read(self, places: list[tuple[int, int]]) -> list[Row | PairRow]:
        """Rows at (source, row)."""
        rows: list[Row | PairRow] = [self.sources[0].format.padding()] * len(places)
        by_shard: dict[tuple[int, int], list[int]] = {}
        for i, (source, row) in enumerate(places):
            shard = int(np.searchsorted(self._starts[source], row, side="right")) - 1
            by_shard.setdefault((source, shard), []).append(i)
        for (source, shard), wanted in by_shard.items():
            inside = [places[i][1] - int(self._starts[source][shard]) for i in wanted]
            records = self._reader(source, shard).read(inside)
            for i, record in zip(wanted, records, strict=True):
                rows[i] = self._with_reference(self.sources[source].format.decode(record), places[i])
        return rows

    def _with_reference(self, row: Row | PairRow, place: tuple[int, int]) -> Row | PairRow:
        known = self.references.get(self.sources[place[0]].fingerprint)
        if known is None or isinstance(row, Row):
            return row
        return row._replace(ref_logps=known[place[1]])

    def _reader(self, source: int, shard: int) -> ArrayRecordReader:
        if (source, shard) not in self._readers:
            # No read-ahead: rows are read in random order.
            opened = ArrayRecordReader(self.sources[source].paths[shard], "readahead_buffer_size:0")
            self._readers.setdefault((source, shard), opened)  # another thread may have been first
        return self._readers[source, shard]

    def close(self) -> None:
        """Closes the files."""
        for reader in self._readers.values():
            reader.close()


@dataclass(frozen=True)
class Layout:
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


class _Steps:
    """The batches of a run by number, for grain."""

    def __init__(self, rows: Rows, order: GlobalOrder, layout: Layout, start_row: int):
        self._rows, self._order, self._layout, self._start = rows, order, layout, start_row

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, step: int) -> Batch | PairBatch:
        wanted = self._layout.rows(self._start + step * self._layout.global_batch_size)
        return stack(self._rows.read([self._order[r] for r in wanted]), self._layout.accumulation)


def stack(rows: Sequence[Row | PairRow], accumulation: int) -> Batch | PairBatch:
    """Rows into a Batch of `accumulation` micro-batches."""
    fields = (np.stack(field) for field in zip(*rows, strict=True))
    kind = PairBatch if isinstance(rows[0], PairRow) else Batch
    return kind(*(x.reshape(accumulation, -1, *x.shape[1:]) for x in fields))


class Loader:
    """Endless batches. `next_row` is the whole state: the first global row that was not handed out yet."""

    def __init__(self, sources: tuple[PreparedSource, ...], order: GlobalOrder, layout: Layout, start_row: int):
        self.sources, self.order, self.next_row = sources, order, start_row
        self._layout = layout
        self._rows = Rows(sources)
        steps = grain.MapDataset.source(_Steps(self._rows, order, layout, start_row))
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        self._batches = iter(steps.to_iter_dataset(options))
        self.fingerprint = digest(
            {
                "sources": [(s.name, s.fingerprint) for s in sources],
                "order": [order.rows, order.shares, order.seed],
                "version": 1,
            }
        )

    def use_references(self, references: References) -> None:
        """Give every pair from here on its reference log-probabilities; to be called before the first batch."""
        self._rows.references = references

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in the order of the configuration."""
        return tuple(source.name for source in self.sources)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources."""
        return self.order.total

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch | PairBatch:
        batch = next(self._batches)
        self.next_row += self._layout.global_batch_size
        return batch

    def drawn(self, row: int | None = None) -> dict[str, tuple[int, int]]:
        """(rows, tokens) drawn from each source before global row `row`, the next one if not given.

        Rows are exact; tokens are rows times the mean of the source, exact after whole epochs.
        """
        counts = self.order.drawn(self.next_row if row is None else row)
        return {s.name: (n, round(n * s.tokens / s.rows)) for s, n in zip(self.sources, counts, strict=True)}

    def close(self) -> None:
        """Ends the reading threads and closes the files."""
        self._batches.close()
        self._rows.close()


def open_loader(
    data: DataConfig,
    *,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    start_row: int = 0,
) -> Loader:
    """Batches of the training sources, prepared first where the cache lacks them.

    Row r of the global order belongs to step r // global_batch_size; inside a step micro-batch a has rows
    a * micro_batch_size and on, of which `shard` (i, n) takes the i-th contiguous n-th.

    Raises:
        ValueError: sizes that do not divide, or anything that `prepare` refuses.
    """
    layout = Layout(global_batch_size, micro_batch_size or global_batch_size, shard)
    prepared = prepare(data, seq_len, seed)
    if prepared.fresh:
        say(prepared.summary())
    sources = prepared.train
    parts = shares([s.rows for s in sources], [s.weight for s in data.train], data.temperature)
    order = GlobalOrder([s.rows for s in sources], parts, seed)
    return Loader(sources, order, layout, start_row)


class EvalSource:
    """The whole validation text of one source, as batches of one micro-batch (A = 1); can be iterated again."""

    def __init__(
        self, source: PreparedSource, batch_size: int, shard: tuple[int, int], references: References | None = None
    ):
        self.name, self.targets, self.fingerprint = source.name, source.targets, source.fingerprint
        self.text_bytes = 0 if source.format.weighted else source.text_bytes  # no text is predicted as a whole
        self._references = references
        self.documents, self.rows = source.documents, source.rows
        self._source, self._layout = source, Layout(batch_size, batch_size, shard)

    def __len__(self) -> int:
        return -(-self.rows // self._layout.global_batch_size)

    def __iter__(self) -> Iterator[Batch | PairBatch]:
        return (self.batch(step) for step in range(len(self)))

    def batch(self, step: int) -> Batch | PairBatch:
        """One batch by its number; rows behind the last are padding."""
        reader = Rows((self._source,), self._references)
        try:
            wanted = self._layout.rows(step * self._layout.global_batch_size)
            rows = reader.read([(0, r) for r in wanted if r < self.rows])
            return stack(rows + [self._source.format.padding()] * (len(wanted) - len(rows)), 1)
        finally:
            reader.close()


def eval_batches(
    data: DataConfig, *, seq_len: int, batch_size: int, shard: tuple[int, int] = (0, 1), seed: int = 0,
    references: References | None = None,
) -> dict[str, EvalSource]:  # fmt: skip
    """Each validation source by name. Every token but BOS is a target exactly once; the last batch is padded.

    `text_bytes` of a source is what its nats are divided by for bits per byte (NUMERICS D7).
    """
    sources = prepare(data, seq_len, seed, train=False).validation
    return {source.name: EvalSource(source, batch_size, shard, references) for source in sources}
