"""A lump: about a megabyte of records of one file; memory does not grow with the input."""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LUMP_BYTES = 1 << 20
_SHOWN = 5  # bad records


@dataclass
class Census:
    """What became of records: counts by name, and the first few bad ones. Unless `skip`, the first ends the run."""

    skip: bool
    bad: int = 0
    bad_examples: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)  # records by the layout of their columns

    def report(self, message: str) -> None:
        """A bad record. Raises ValueError(message) unless bad records are skipped."""
        if not self.skip:
            raise ValueError(message)
        self.bad += 1
        self.bad_examples = [*self.bad_examples, message][:_SHOWN]

    def add(self, other: "Census") -> None:
        """Adds what was counted of other records."""
        self.bad += other.bad
        self.bad_examples = (self.bad_examples + other.bad_examples)[:_SHOWN]
        self.counts.update(other.counts)
        self.layouts.update(other.layouts)


@dataclass(frozen=True)
class Lump:
    """Consecutive records of one file: raw lines of jsonl, or records that were read already."""

    file: str
    first: int  # number of the first record
    lines: bytes = b""
    records: tuple[Any, ...] = ()  # None: a bad one, which was reported

    def parse(self, census: Census) -> Iterator[tuple[int, Any]]:
        """Yields (record number, record); blank lines are passed over."""
        yield from ((number, record) for number, record in enumerate(self.records, self.first) if record is not None)
        if not self.lines:
            return
        for number, line in enumerate(self.lines.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
            except UnicodeDecodeError as error:
                census.report(f"{self.file}, line {number}: not UTF-8 (byte {error.start + 1} of the line)")
            except (ValueError, RecursionError) as error:
                at_its_end = getattr(error, "pos", 0) >= len(line.decode("utf-8").strip())
                why = f"{error}; a record over several lines? each has to be on one" if at_its_end else error
                census.report(f"{self.file}, line {number}: malformed JSON ({why})")
            else:
                if isinstance(record, dict):
                    yield number, record
                else:
                    census.report(f"{self.file}, line {number}: expected a JSON object, found {kind_of(record)}")

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return len(self.lines) + sum(len(v) for r in self.records if r for v in r.values() if isinstance(v, str))

    def where(self, number: int) -> str:
        """How an error message names a record."""
        return f"{self.file}, {'line' if self.lines else 'record'} {number}"


def kind_of(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
