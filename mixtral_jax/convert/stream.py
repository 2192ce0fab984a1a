"""Slots from a source to a sink: concurrent, in bounded memory, each written exactly once."""

import ctypes
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from mixtral_jax.checkpoint import PIECE
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory, read_small_files
from mixtral_jax.convert.table import Slot

BUDGET = 512 << 20  # bytes that all pieces in flight may take together
WORKERS = max(2, min(16, (os.cpu_count() or 2) + 1))
ReadRows = Callable[[int, int], np.ndarray]
DtypeOf = Callable[[Slot], np.dtype]


class Source(ABC):
    """Hub tensors to read, a range of rows at a time and from any thread."""

    config: MixtralConfig
    slots: list[Slot]
    hf_config: Mapping[str, Any] = MappingProxyType({})  # what is known of its config.json

    @abstractmethod
    def dtype(self, slot: Slot) -> np.dtype: ...

    @abstractmethod
    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        """Hub rows start ... stop - 1, as (rows, cols) or (rows,)."""

    def band(self, slot: Slot) -> int | None:
        """Rows that it is best to read at once; None: any number."""
        return None

    def cost(self, slot: Slot) -> int:
        """Bytes that reading one band holds: a few rows, or the band as it is stored and as it is given."""
        band = self.band(slot)
        return 1 << 20 if band is None else 2 * band * slot.cols * self.dtype(slot).itemsize

    def grid(self, slot: Slot) -> tuple[int, ...]:
        """How many indices of each axis of its leaf lie together, and are best read one after another."""
        leaf = slot.leaf
        step = [1 if axis in leaf.single else n for axis, n in enumerate(leaf.shape)]
        step[leaf.rows_axis] = max(1, (self.band(slot) or 1) // leaf.row_step)
        return tuple(step)

    def place(self, slot: Slot, start: int) -> tuple[str, list[int]]:
        """Where in that grid hub row `start` lies."""
        first = (i if isinstance(i, int) else i.start or 0 for i in slot.box(start, start))
        return slot.leaf.path, [i // step for i, step in zip(first, self.grid(slot), strict=True)]

    def side_files(self) -> Directory | None:
        """Where its tokenizer is."""
        return None

    def small_files(self) -> dict[str, bytes]:
        """Its tokenizer and what belongs to it, by the usual names."""
        origin = self.side_files()
        return {} if origin is None else read_small_files(origin)

    def template(self) -> Any:
        """The chat template of the run that it comes from: a name or a description."""
        return None


class Sink(Protocol):
    """Where slots go. Used in a `with` block, whose good end makes whole what was written."""

    slots: list[Slot]  # in the order in which they must come, if they must come in order

    def put(self, slot: Slot, start: int, stop: int, rows: ReadRows) -> None:
        """Take hub rows start ... stop - 1, which `rows(a, b)` gives in the dtype of the sink."""


class NativeSource(Source):
    """What sources of native arrays have in common: slots are cut out of boxes."""

    @abstractmethod
    def read_box(self, path: str, box: tuple[int | slice, ...]) -> np.ndarray:
        """A part of a native leaf."""

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        return slot.to_hub(self.read_box(slot.leaf.path, slot.box(start, stop)))


class ChangedSource(Source):
    """`inner` with other slots; what is not changed is read from the slot of the same meaning."""

    def __init__(self, inner: Source, config: MixtralConfig, changed: list[Slot]) -> None:
        self.inner, self.config, self.slots, self.hf_config = inner, config, changed, inner.hf_config
        self.there = {slot.meaning: slot for slot in inner.slots}

    def origin(self, slot: Slot) -> Slot:
        """The slot of the inner source that a slot is read from."""
        return self.there[slot.meaning]

    def dtype(self, slot: Slot) -> np.dtype:
        return self.inner.dtype(self.origin(slot))

    def band(self, slot: Slot) -> int | None:
        return self.inner.band(self.origin(slot))

    def cost(self, slot: Slot) -> int:
        return self.inner.cost(self.origin(slot))

    def place(self, slot: Slot, start: int) -> tuple[str, list[int]]:
        return self.inner.place(self.origin(slot), start)

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        return self.inner.read(self.origin(slot), start, stop)

    def side_files(self) -> Directory | None:
        return self.inner.side_files()

    def small_files(self) -> dict[str, bytes]:
        return self.inner.small_files()

    def template(self) -> Any:
        return self.inner.template()


@dataclass
class Tally:
    """What was written, and what looked wrong in it."""

    rows: Counter[str] = field(default_factory=Counter)
    not_finite: dict[str, str] = field(default_factory=dict)
    bytes: int = 0


def bands(slot: Slot, itemsize: int, band: int | None) -> int:
    """Rows of a piece: what the source asks for, else PIECE bytes or a little more, in whole heads."""
    if band is not None:
        return band
    step = slot.leaf.row_step
    pieces = max(1, slot.rows * slot.cols * itemsize // PIECE)
    per = -(-slot.rows // pieces)
    return min(slot.rows, -(-per // step) * step)


def _trim() -> None:
    """Give freed memory back: glibc keeps it in a heap for each thread, 70 to 150 MB of a model of 550."""
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def copy(
    source: Source,
    sink: Sink,
    dtype_of: DtypeOf,
    advance: Callable[[int], None] = lambda n: None,
    *,
    in_order: bool = False,
) -> Tally:
    """Write every slot of `source` into `sink`, once; what lies together in the source, one after another.

    Args:
        dtype_of: the dtype in which a slot is written.
        advance: told the bytes written, as they are.
        in_order: one piece after another, as the sink has them, for sinks that cannot seek.

    Raises:
        ValueError: a slot was written twice or not at all (both lists), or a read or write failed.
    """
    tally, lock = Tally(), threading.Lock()

    def piece(slot: Slot, start: int, stop: int) -> None:
        target, odd = dtype_of(slot), set[str]()

        def rows(a: int, b: int) -> np.ndarray:
            block = source.read(slot, a, b)
            if block.dtype != target:
                with np.errstate(over="ignore"):  # what overflows becomes infinite, and is reported below
                    block = block.astype(target)
            odd.add(_not_finite(block))
            return block

        sink.put(slot, start, stop, rows)
        size = (stop - start) * slot.cols * target.itemsize
        with lock:
            tally.rows[slot.name] += stop - start
            due = (tally.bytes + size) // PIECE > tally.bytes // PIECE
            tally.bytes += size
            if what := min(odd - {""}, default=""):
                tally.not_finite.setdefault(slot.name, what)
            advance(size)
        if due:
            _trim()

    pieces = [
        (slot, a, min(a + rows, slot.rows), cost)
        for slot in sink.slots
        for rows in [bands(slot, dtype_of(slot).itemsize, source.band(slot))]
        for cost in [source.cost(slot) + 2 * rows * slot.cols * dtype_of(slot).itemsize]
        for a in range(0, slot.rows, rows)
    ]

    pieces = pieces if in_order else sorted(pieces, key=lambda piece: source.place(*piece[:2]))
    run(((partial(piece, slot, a, b), cost) for slot, a, b, cost in pieces), 1 if in_order else WORKERS)
    missing = [s.name for s in source.slots if tally.rows[s.name] < s.rows]
    twice = [s.name for s in source.slots if tally.rows[s.name] > s.rows]
    if missing or twice:
        raise ValueError(
            f"slots not written: {', '.join(missing) or 'none'}; written twice: {', '.join(twice) or 'none'}"
        )
    return tally


def run(tasks: Iterable[tuple[Callable[[], None], int]], workers: int = WORKERS) -> None:
    """All tasks on threads, as many at once as BUDGET allows by their cost in bytes, at least one. An error ends it."""
    flying: dict[Future[None], int] = {}

    def land() -> None:
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        for future in done:
            del flying[future]
            future.result()

    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        for task, cost in tasks:
            while flying and (len(flying) >= workers or sum(flying.values()) + cost > BUDGET):
                land()
            flying[pool.submit(task)] = cost
        while flying:
            land()


def _not_finite(block: np.ndarray) -> str:
    """ "NaN" or "infinity" where a value is one: its exponent is all ones, and its bits are an infinity's or more."""
    bits, infinity = (a.view(f"u{block.dtype.itemsize}") for a in (block, np.array(np.inf, block.dtype)))
    largest = int((bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)).max())
    return "NaN" if largest > infinity else "infinity" if largest == infinity else ""
