"""Slots from a source to a sink: concurrent, in bounded memory, each written exactly once."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import ml_dtypes
import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.table import Slot

BUDGET = 512 << 20  # bytes that all pieces in flight may take together
PIECE = 8 << 20  # a slot is cut into pieces of about this size; larger ones go back to the system and fault anew
STRIP = 8  # rows transposed at a time: what is read is still in the cache when it is turned
Rows = Callable[[int, int], np.ndarray]


class Source(Protocol):
    """Hub tensors to read, a range of rows at a time and from any thread."""

    config: MixtralConfig
    slots: list[Slot]

    def dtype(self, slot: Slot) -> np.dtype: ...

    def band(self, slot: Slot) -> int | None:
        """Rows that it is best to read at once; None: any number."""

    def cost(self, slot: Slot) -> int:
        """Bytes that reading one band holds."""

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        """Hub rows start ... stop - 1, as (rows, cols) or (rows,)."""


class Sink(Protocol):
    """Where slots go."""

    def put(self, slot: Slot, start: int, stop: int, rows: Rows) -> None:
        """Take hub rows start ... stop - 1, which `rows(a, b)` gives in the dtype of the sink."""


@dataclass
class Tally:
    """What was written, and what looked wrong in it."""

    rows: Counter[str] = field(default_factory=Counter)
    not_finite: dict[str, str] = field(default_factory=dict)
    bytes: int = 0


def bands(slot: Slot, itemsize: int, band: int | None) -> int:
    """Rows of a piece: what the source asks for, else about PIECE bytes, in whole heads."""
    if band is not None:
        return band
    step = slot.leaf.row_step
    pieces = max(1, round(slot.rows * slot.cols * itemsize / PIECE))
    per = -(-slot.rows // pieces)
    return min(slot.rows, -(-per // step) * step)


def copy(
    source: Source,
    sink: Sink,
    dtype_of: Callable[[Slot], np.dtype],
    advance: Callable[[int], None] = lambda n: None,
    *,
    in_order: bool = False,
    slots: Iterable[Slot] | None = None,
) -> Tally:
    """Write every slot of `source` into `sink`, once.

    Args:
        dtype_of: the dtype in which a slot is written.
        advance: told the bytes written, as they are.
        in_order: one piece after another, for sinks that cannot seek.
        slots: the order; that of the source by default.

    Raises:
        ValueError: a slot was written twice or not at all (both lists), or a read or write failed.
    """
    tally, lock = Tally(), threading.Lock()

    def piece(slot: Slot, start: int, stop: int) -> None:
        target = dtype_of(slot)
        check = _Finite()

        def rows(a: int, b: int) -> np.ndarray:
            block = source.read(slot, a, b)
            if block.dtype != target:
                with np.errstate(over="ignore"):  # what overflows becomes infinite, and is reported below
                    block = block.astype(target)
            check.see(block)
            return block

        sink.put(slot, start, stop, rows)
        size = (stop - start) * slot.cols * target.itemsize
        with lock:
            tally.rows[slot.name] += stop - start
            tally.bytes += size
            if check.found:
                tally.not_finite.setdefault(slot.name, check.found)
            advance(size)

    wanted = list(source.slots if slots is None else slots)
    pieces = (
        (slot, a, min(a + rows, slot.rows), cost)
        for slot in wanted
        for rows in [bands(slot, dtype_of(slot).itemsize, source.band(slot))]
        for cost in [source.cost(slot) + 2 * rows * slot.cols * dtype_of(slot).itemsize]
        for a in range(0, slot.rows, rows)
    )
    _run(piece, pieces, 1 if in_order else max(2, min(16, (os.cpu_count() or 2) + 1)))
    missing = [s.name for s in source.slots if tally.rows[s.name] < s.rows]
    twice = [s.name for s in source.slots if tally.rows[s.name] > s.rows]
    if missing or twice:
        raise ValueError(
            f"slots not written: {', '.join(missing) or 'none'}; written twice: {', '.join(twice) or 'none'}"
        )
    return tally


def _run(piece: Callable[[Slot, int, int], None], pieces: Iterable[tuple[Slot, int, int, int]], workers: int) -> None:
    """All pieces on `workers` threads, as many at once as BUDGET allows, at least one. The first error ends it."""
    flying: dict[Future[None], int] = {}

    def land() -> None:
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        for future in done:
            del flying[future]
            future.result()

    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        for slot, start, stop, cost in pieces:
            while flying and (len(flying) >= workers or sum(flying.values()) + cost > BUDGET):
                land()
            flying[pool.submit(piece, slot, start, stop)] = cost
        while flying:
            land()


def turned(rows: Rows, start: int, stop: int, cols: int, dtype: np.dtype, strip: int) -> np.ndarray:
    """Hub rows as a new (cols, rows) matrix, read and transposed strip by strip."""
    out = np.empty((cols, stop - start), dtype)
    for a in range(start, stop, strip):
        b = min(a + strip, stop)
        out[:, a - start : b - start] = rows(a, b).T
    return out


def blocked_transpose(matrix: np.ndarray) -> np.ndarray:
    """matrix.T as a contiguous copy; several times faster than numpy's on matrices that exceed the cache."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for a in range(0, matrix.shape[0], 1024):
        for b in range(0, matrix.shape[1], 32):
            out[b : b + 32, a : a + 1024] = matrix[a : a + 1024, b : b + 32].T
    return out


class _Finite:
    """Remembers whether any value seen was NaN or infinite, from the bits: exponent all ones."""

    _EXPONENT = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00, np.dtype(np.float32): 0x7F800000}

    def __init__(self) -> None:
        self.found = ""

    def see(self, block: np.ndarray) -> None:
        exponent = self._EXPONENT[block.dtype]
        bits = block.view(f"u{block.dtype.itemsize}")
        no_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
        largest = int((bits & no_sign).max())
        if largest >= exponent and self.found != "NaN":
            self.found = "NaN" if largest > exponent else "infinity"
