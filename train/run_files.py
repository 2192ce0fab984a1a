"""What the files of a run say, which are only read: here nothing imports jax, and none need be there, or whole."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mixtral_jax.train.errors import UserError

ENDED = ("done", "preempted", "diverged", "failed", "watchdog")
NAMES = ("run_name", "output_dir")  # settings that any two runs have otherwise
SILENT_SECONDS = 60  # a run that lives writes STATUS every 10
TAIL_BYTES = 1 << 18  # of metrics.jsonl, for its last lines
SIGNS = ("STATUS", "metrics.jsonl", "env.json", "config.yaml", ".")  # files of a run whose times tell of its clock
_BLOCK = 1 << 20
Advance = Callable[[int, str], None]  # of data.progress.meter


class Standing(NamedTuple):
    """One run, as `ls` shows it; None: not known."""

    run: str
    state: str
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    goodput: float | None
    age: float | None  # seconds since its STATUS was written
    reason: str


def is_run(place: Path) -> bool:
    """STATUS and metrics.jsonl are a run's alone; others have a config.yaml too."""
    try:
        found = {name for name in SIGNS if (place / name).is_file()}
    except OSError:
        return False
    return bool(found & {"STATUS", "metrics.jsonl"}) or {"config.yaml", "env.json"} <= found


def runs_inside(root: Path) -> list[Path]:
    """The directories in another one that are runs, by name."""
    return sorted(place for place in root.iterdir() if place.is_dir() and is_run(place))


def find_run(name: str) -> Path:
    """The directory of a run.

    Raises:
        UserError: it is none; says which are in it.
    """
    place = Path(name)
    if not place.is_dir():
        raise UserError(f"{place} is no directory of a run")
    if not is_run(place):
        inside = ", ".join(map(str, runs_inside(place)[:5]))
        raise UserError(f"{place} is no run: it has no STATUS{f'; in it are {inside}' if inside else ''}")
    return place


def last_attempt(run: Path) -> int:
    """The number of the last start of a run; 0: there is none."""
    return max((int(p.name) for p in (run / "attempts").glob("*") if p.name.isdecimal()), default=0)


def standing(place: Path, newest: float = 0.0) -> Standing:
    """What the files of a run say; `newest` is the latest time that was seen on its file system."""
    status, config = json_object(place / "STATUS"), yaml_object(place / "config.yaml")
    lines = list(lines_backwards(place / "metrics.jsonl", TAIL_BYTES))
    state, age = str(status.get("state", "unknown")), _age(place, status, newest)
    lives = state not in (*ENDED, "unknown") and status.get("exit_code") is None
    reason = str(status.get("reason") or "")
    step = whole(status.get("step"))
    if (lives and "time" not in status) or step is None:  # before there was a heartbeat STATUS stayed as it began
        step = max((whole(line.get("step")) or 0 for line in lines), default=step)
    if lives and age is not None and age > SILENT_SECONDS:
        state, reason = "stopped responding", f"{state} at step {step}, and nothing since"
    return Standing(
        str(place), state, step, whole(config.get("steps")), _last(lines, "train/loss"),
        _last(lines, "perf/tokens_per_second"), number(status.get("goodput")), age, reason,
    )  # fmt: skip


def _age(place: Path, status: Mapping[str, Any], newest: float) -> float | None:
    """Seconds since STATUS was written, by the clock of its file system, which need not be ours.

    The newest time that was seen there is not in the future. Where all that the run has written looks older than the
    time in its STATUS, which the run's host wrote, that clock is behind.
    """
    times, now = times_of(place), time.time()
    beat = times.get("STATUS", times.get("metrics.jsonl"))
    if beat is None:
        return None
    if "time" not in status:
        beat = max(beat, times.get("metrics.jsonl", beat))
    written, last = _seconds(status.get("time")), max(times.values())
    behind = 0.0
    if written is not None and written <= now + 1:
        if beat > now + 1:  # the file system's clock is ahead of ours
            return max(now - written, 0.0)
        behind = max(written - last, 0.0)
    return max(max(now, newest) - beat - behind, 0.0)


def times_of(place: Path) -> dict[str, float]:
    """When each of a run's files was written, and the directory last changed."""
    found = {}
    for name in SIGNS:
        with contextlib.suppress(OSError):
            found[name] = (place / name).stat().st_mtime
    return found


def json_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where it is not there, or damaged."""
    with contextlib.suppress(OSError):
        return parsed(file.read_bytes()) or {}
    return {}


def yaml_object(file: Path) -> dict[str, Any]:
    """The same of YAML."""
    try:
        found = YAML(typ="safe").load(file.read_bytes())
    except (OSError, ValueError, RecursionError, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def parsed(line: bytes) -> dict[str, Any] | None:
    """A JSON object, NaN and infinities in it too; None: it is not whole, or no object."""
    try:
        found = from_json(line)  # in 0.4 of json's time
    except ValueError:
        try:
            found = json.loads(line)  # takes half a surrogate
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, dict) else None


def lines_backwards(
    file: Path, last_bytes: int | None = None, advance: Advance | None = None
) -> Iterator[dict[str, Any]]:
    """The objects with a `step` of a file of JSON lines, the last one first; of its end alone where that is asked for.

    In bounded memory; lines that are cut off or damaged are left out, and a file that cannot be read has none.
    `advance` is told the bytes that were read, and of what.
    """
    with contextlib.suppress(OSError), file.open("rb") as stream:
        position, rest = stream.seek(0, os.SEEK_END), b""
        first = 0 if last_bytes is None else max(0, position - last_bytes)
        while position > first:
            before, position = position, max(first, position - _BLOCK)
            stream.seek(position)
            if advance is not None:
                advance(before - position, file.name)
            rest, *lines = (stream.read(before - position) + rest).split(b"\n")
            for line in (*reversed(lines), *([] if position else [rest])):
                if line and (found := parsed(line)) and whole(found.get("step")) is not None:
                    yield found


def _last(lines: list[dict[str, Any]], name: str) -> float | None:
    return next((value for line in lines if (value := number(line.get(name))) is not None), None)


def number(value: Any) -> float | None:
    """As a float, NaN too; None: it is no number."""
    if value.__class__ is float:  # nearly always
        return value
    try:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def whole(value: Any) -> int | None:
    """The same of whole numbers, as far as a float can count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53 else None


def _seconds(when: Any) -> float | None:
    """Of the epoch, from such a number or an ISO date."""
    try:
        return datetime.fromisoformat(when).timestamp() if isinstance(when, str) else number(when)
    except (ValueError, OverflowError, OSError):  # no date, or one that no clock shows
        return None


def flat(values: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """`a.b` -> leaf."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{below}": leaf for below, leaf in flat(value).items()}
        elif key not in skip:
            found[str(key)] = value
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two flat mappings have otherwise; None where one has it not."""
    return {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}
