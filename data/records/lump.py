"""A unit is what one worker reads of one file, a lump about a megabyte of its records: memory stays bounded."""

import codecs
import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mixtral_jax.data.records.files import open_file

LUMP_BYTES = 1 << 20
_SHOWN = 5  # bad records


class Unit(NamedTuple):
    """A share of a file: bytes of lines, row groups of Parquet, or records, from `start` up to but not `stop`."""

    file: str
    start: int = 0
    stop: int | None = None  # None: its end
    first: int = 0  # records of row groups before it
    size: int = 0  # bytes of text, roughly


class Place(NamedTuple):
    """Where a record is. It is counted only where somebody asks: a unit does not know how many lines are before it."""

    file: str
    number: int  # from 1
    kind: str = "record"
    offset: int = 0  # of lines: bytes of the file in front of the one with number 1

    def __str__(self) -> str:
        return f"{self.file}, {self.kind} {self.number + lines_before(self.file, self.offset)}"


@functools.lru_cache(maxsize=8)
def lines_before(file: str, offset: int) -> int:
    """Lines that end in the first `offset` bytes of a file."""
    if not offset:
        return 0
    lines = 0
    with open_file(file) as stream:
        while offset and (block := stream.read(min(offset, LUMP_BYTES))):
            lines, offset = lines + block.count(b"\n"), offset - len(block)
    return lines


@dataclass
class Census:
    """What became of records: counts by name, and the first few bad ones. Unless `skip`, the first ends the run."""

    skip: bool
    unit: int = 0  # in which they are
    bad: int = 0
    first: list[tuple[int, Any, str]] = field(default_factory=list)  # bad ones: unit, place, what is wrong
    counts: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)  # records by the layout of their columns

    def report(self, where: Place | str, what: object) -> None:
        """A bad record. Raises ValueError("where: what") unless bad records are skipped."""
        if not self.skip:
            raise ValueError(f"{where}: {what}")
        self.bad += 1
        self.first = [*self.first, (self.unit, where, str(what))][:_SHOWN]

    @property
    def bad_examples(self) -> list[str]:
        """The first few bad records, in the order of the files."""
        return [f"{where}: {what}" for _, where, what in self.first]

    def add(self, other: "Census") -> None:
        """Adds what was counted of other records."""
        self.bad += other.bad
        self.first = sorted(self.first + other.first, key=lambda it: it[0])[:_SHOWN]
        self.counts.update(other.counts)
        self.layouts.update(other.layouts)


@dataclass(frozen=True)
class Lump:
    """Consecutive records of one file: raw lines of jsonl, or records that were read already."""

    file: str
    first: int  # number of the first record
    lines: bytes = b""
    records: tuple[Any, ...] = ()  # None: a bad one, which was reported
    offset: int = 0  # see Place

    def parse(self, census: Census) -> Iterator[tuple[int, Any]]:
        """Yields (record number, record); blank lines are passed over."""
        yield from ((number, record) for number, record in enumerate(self.records, self.first) if record is not None)
        for number, marked in enumerate(self.lines.split(b"\n"), self.first):
            line = marked.removeprefix(codecs.BOM_UTF8)
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                at = error.start + 1 + len(marked) - len(line)
                census.report(self.where(number), f"not UTF-8 (byte {at} of the line)")
            except (ValueError, RecursionError) as error:
                at_its_end = getattr(error, "pos", 0) >= len(line.decode("utf-8").strip())
                why = f"{error}; a record over several lines? each has to be on one" if at_its_end else error
                census.report(self.where(number), f"malformed JSON ({why})")
            else:
                if isinstance(record, dict):
                    yield number, record
                else:
                    census.report(self.where(number), f"expected a JSON object, found {kind_of(record)}")

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return len(self.lines) + sum(len(v) for r in self.records if r for v in r.values() if isinstance(v, str))

    def where(self, number: int) -> Place:
        """What an error message names a record by."""
        return Place(self.file, number, "line" if self.lines else "record", self.offset)


def kind_of(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
