"""What must hold of a run's directory after every attempt, and of a run that is done."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

_NUMBERS = ("train/", "eval/", "moe/", "counts")  # not what was timed, nor who measured it


def whole_steps(checkpoints: Path) -> set[int]:
    """Steps whose checkpoint is committed, with every file in its size."""
    found = {int(p.name) for p in checkpoints.glob("*") if p.name.isdigit() and not p.is_symlink()}
    return {step for step in found if _is_whole(checkpoints / str(step))}


def _is_whole(path: Path) -> bool:
    if not (path / "commit_success.txt").exists():
        return False
    if not (path / "files.json").exists():
        return True  # killed between the commit and the list
    try:
        sizes = json.loads((path / "files.json").read_text())
    except ValueError:
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items())


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of one object a line; what stands behind the last line break does not count."""
    if not file.exists():
        return []
    *whole, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return [json.loads(line) for line in whole if line]


def numbers(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], Any]:
    """(step, name) -> value of everything that another attempt must measure alike.

    Raises:
        ValueError: something was written twice.
    """
    found: dict[tuple[int, str], Any] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(_NUMBERS):
                if (row["step"], name) in found:
                    raise ValueError(f"{name} of step {row['step']} is there twice")
                found[row["step"], name] = value
    return found


def read_status(run: Path) -> dict[str, Any] | None:
    """STATUS; None: there is none.

    Raises:
        ValueError: it is half written.
    """
    try:
        return json.loads((run / "STATUS").read_text())
    except FileNotFoundError:
        return None


def status_text(run: Path) -> str:
    """Of STATUS; empty where there is none."""
    place = run / "STATUS"
    return place.read_text() if place.exists() else ""


def arrays(path: Path) -> dict[str, bytes]:
    """Every array of a checkpoint as it lies on disk."""
    from mixtral_jax.checkpoint.slices import ArrayReader

    reader = ArrayReader(path)
    return {name: np.asarray(reader.read(name, ())).tobytes() for name in sorted(reader.names)}


@dataclass(frozen=True)
class Reference:
    """What a run that nobody disturbed has measured and saved."""

    steps: int
    rows: Mapping[str, dict[tuple[int, str], Any]]  # by file
    arrays: dict[str, bytes]  # of the last checkpoint
    dataset: str  # its place in the data

    @classmethod
    def of(cls, run: Path, steps: int) -> Self:
        """Read it from the run's directory."""
        last = run / "checkpoints" / str(steps)
        rows = {name: numbers(lines_of(run / name)) for name in ("metrics.jsonl", "moe.jsonl")}
        return cls(steps, rows, arrays(last), (last / "dataset" / "data.json").read_text())


class History:
    """One run over its attempts: what was whole, what we took away ourselves, and what is wrong."""

    def __init__(self, run: Path, reference: Reference, keep_last: int):
        self.run, self._reference, self._keep_last = run, reference, keep_last
        self.whole: set[int] = set()
        self.cut_until = dict.fromkeys(reference.rows, 0)  # rows up to here may lack: we cut them off
        self._status: dict[str, Any] | None = None
        self._text = ""  # of STATUS

    def before(self, cut: str | None = None) -> None:
        """Look at the run as an attempt finds it, after `cut` was cut: steps before a checkpoint are not made again."""
        self.whole = whole_steps(self.run / "checkpoints")
        if cut in self.cut_until:
            self.cut_until[cut] = max(self.cut_until[cut], *self.whole, 0)
        try:
            self._text = status_text(self.run)
            self._status = read_status(self.run)
        except ValueError:  # cut
            self._status = None

    def after(self, codes: list[int], full: bool) -> list[str]:
        """What is wrong with the run after an attempt that ended so; `full`: its disk was.

        Every promise is about the directory alone, so that it holds for whatever comes next.
        """
        done = set(codes) == {0} or self._claims_an_end()  # it may be killed behind its last word
        return [*self._rows(done), *self._checkpoints(done), *self._last_word(codes, full)]

    def _claims_an_end(self) -> bool:
        with contextlib.suppress(ValueError):
            return (read_status(self.run) or {}).get("exit_code") == 0
        return False

    def _rows(self, done: bool) -> list[str]:
        told = []
        for name, wanted in self._reference.rows.items():
            try:
                rows = lines_of(self.run / name)
                found = numbers(rows)
            except ValueError as error:
                told.append(f"{name}: {error}")
                continue
            attempts = [row["attempt"] for row in rows if "attempt" in row]
            if attempts != sorted(attempts):
                told.append(f"{name}: a line of an earlier attempt behind one of a later: {attempts}")
            other = [key for key, value in found.items() if repr(wanted.get(key)) != repr(value)]
            if other:
                told.append(f"{name}: {other[0]} is {found[other[0]]}, undisturbed {wanted.get(other[0])}")
            last = self._reference.steps if done else max((step for step, _ in found), default=0) - 1
            lack = [key for key in wanted if self.cut_until[name] < key[0] <= last and key not in found]
            if lack:
                told.append(f"{name}: {lack[0]} is missing, and {len(lack) - 1} more")
        return told

    def _checkpoints(self, done: bool) -> list[str]:
        place, told = self.run / "checkpoints", []
        now = whole_steps(place)
        newest = sorted(self.whole | now)[-self._keep_last :]
        if gone := [step for step in newest if step not in now]:
            told.append(f"whole checkpoints {gone} are gone; there were {sorted(self.whole)}, there are {sorted(now)}")
        if done:
            last = place / str(self._reference.steps)
            if self._reference.steps not in now:
                told.append(f"done without checkpoint {self._reference.steps}")
            elif arrays(last) != self._reference.arrays:
                told.append("the last checkpoint has other arrays than that of the undisturbed run")
            elif (last / "dataset" / "data.json").read_text() != self._reference.dataset:
                told.append("the last checkpoint stands at another place in the data")
        return told

    def _last_word(self, codes: list[int], full: bool) -> list[str]:
        try:
            status = read_status(self.run)
        except ValueError as error:
            return [] if full or status_text(self.run) == self._text else [f"STATUS is no JSON: {error}"]
        if status == self._status:  # the attempt was refused, or ended before its first word
            return [] if 0 not in codes or (status or {}).get("exit_code") == 0 else [f"exit 0 with STATUS {status}"]
        if status is None:
            return ["STATUS is gone"]
        code = status["exit_code"]
        if codes[0] >= 0 and code != codes[0] and not full:  # process 0 writes it
            return [f"exit {codes[0]}, but STATUS says {status}"]
        if set(codes) == {-9} and code not in (None, 0):
            return [f"killed, but STATUS says {status}"]
        if code == 0 and (status["state"], status["step"]) != ("done", self._reference.steps):
            return [f"STATUS has exit code 0 with work undone: {status}"]
        return []
