"""Which runs there are, how two differ, what one is doing: as the files in their directories say, which are only read.

Nothing here imports jax, and nothing relies on a file being there, whole, or of this version.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mixtral_jax.train.console import age, eval_lines, train_line
from mixtral_jax.train.errors import UserError

SILENT_SECONDS = 60  # a run that lives writes STATUS every 10
FOLLOW_SECONDS = 1.0
TAIL_BYTES = 1 << 18  # of metrics.jsonl, for its last lines
ENDED = ("done", "preempted", "diverged", "failed", "watchdog")
SIGNS = ("STATUS", "metrics.jsonl", "env.json", "config.yaml", ".")  # files of a run whose times tell of its clock
_NAMES = ("run_name", "output_dir")


class Row(NamedTuple):
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


def ls(directory: str, *, as_json: bool = False) -> None:
    """The runs in a directory (or the one that it is), the newest first.

    Raises:
        UserError: there is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"{root} is no directory: say where runs are, such as runs")
    places = [root] if _is_run(root) else sorted(filter(_is_run, _inside(root)))
    newest = max((mtime for place in places for mtime in _times(place).values()), default=0.0)
    rows = sorted((_row(place, newest) for place in places), key=lambda row: math.inf if row.age is None else row.age)
    if as_json:
        _json([row._asdict() for row in rows])
    elif not rows:
        _say(f"there are no runs in {root}")
    else:
        _say(*_table([("run", "state", "step", "loss", "tokens/s", "goodput", "age"), *map(_cells, rows)]))


def diff(a: str, b: str, *, as_json: bool = False) -> None:
    """In what two runs differ: settings, versions and machine, losses, and the last evaluation of each.

    Raises:
        UserError: one of them is no run.
    """
    places = _run(a), _run(b)
    settings = [_flat(_yaml(place / "config.yaml"), skip=_NAMES) for place in places]
    machines = [_flat(_object(place / "env.json"), skip=("command",)) for place in places]
    lines = [_lines(place) for place in places]
    found = {
        "settings": _differences(*settings),
        "environment": _differences(*machines),
        "losses": _parting(*map(_losses, lines)),
        "evaluation": _evaluations(*lines),
    }
    if as_json:
        _json({"a": str(places[0]), "b": str(places[1]), **found})
        return
    short = [place.resolve().name for place in places]
    names = short if len(set(short)) == 2 else [a, b]
    for name, file, of in (("settings", "config.yaml", settings), ("environment", "env.json", machines)):
        missing = [str(place / file) for place, known in zip(places, of, strict=True) if not known]
        pairs = found[name]
        _say(f"{name}: {f'not known, without {missing[0]}' if missing else '' if pairs else 'the same'}".rstrip())
        if pairs and not missing:
            _say(*_table([("", *names), *((k, *map(_shown, pair)) for k, pair in pairs.items())]))
    _say(_parting_line(found["losses"]))
    if found["evaluation"]:
        rows = [(key, *map(_number, pair)) for key, pair in found["evaluation"].items()]
        _say("last evaluation:", *_table([("", *names), *rows]))
    else:
        _say("last evaluation: none")


def tail(run: str, *, lines: int = 10, follow: bool = False) -> None:
    """The last lines of a run's metrics, and how it stands; with `follow` those that come, until it ends.

    Raises:
        UserError: it is no run.
    """
    place = _run(run)
    if lines < 0:
        raise UserError(f"--lines is {lines}: a number of lines is 0 or more")
    steps, feed = _whole(_yaml(place / "config.yaml").get("steps")), _Feed(place / "metrics.jsonl")
    seen = feed.more(None if lines > 1000 else TAIL_BYTES)
    for line in seen[len(seen) - min(lines, len(seen)) :]:
        _say(_told(line, steps))
    row = _row(place)
    if not follow or row.state in ENDED:
        _say(_standing(row))
        return
    with contextlib.suppress(KeyboardInterrupt):
        _follow(place, feed, steps)


def _say(*lines: str) -> None:
    """Half surrogates, of a name or a line that is no UTF-8, as question marks."""
    for line in lines:
        print(line.encode(errors="replace").decode(), flush=True)


def _json(found: Any) -> None:
    print(json.dumps(found, indent=2, default=str))  # dates, of a YAML file


def _follow(place: Path, feed: "_Feed", steps: int | None) -> None:
    """Lines as they come, until STATUS says that the run has ended, and how."""
    said = ""
    while said not in ENDED:
        row = _row(place)  # before the lines: behind an end there are no more
        for line in feed.more():
            _say(_told(line, steps))
        if row.state in (*ENDED, "stopped responding") and row.state != said:
            _say(_standing(row))
        said = row.state
        if said not in ENDED:
            time.sleep(FOLLOW_SECONDS)


class _Feed:
    """The lines of a file as they come; one that was written anew is read on behind what it has kept."""

    def __init__(self, file: Path):
        self._file, self._inode, self._began, self._read = file, 0, 0, 0
        self._lines: list[int] = []  # hashes of those since `began`

    def more(self, last_bytes: int | None = None) -> list[dict[str, Any]]:
        """What was not read yet; of the first time the last bytes."""
        try:
            with self._file.open("rb") as stream:
                stat = os.fstat(stream.fileno())
                if self._inode and (stat.st_ino != self._inode or stat.st_size < self._read):
                    _say("started again, from a checkpoint")
                    self._find_place(stream, stat.st_size)
                elif not self._inode and last_bytes is not None:
                    self._began = self._read = max(0, stat.st_size - last_bytes)
                self._inode = stat.st_ino
                stream.seek(self._read)
                found = stream.read()
        except OSError:
            return []
        lines = found[: found.rfind(b"\n") + 1].splitlines(keepends=True)
        self._read += sum(map(len, lines))
        self._lines += map(hash, lines)
        return [line for line in map(_parsed, lines) if line and _whole(line.get("step")) is not None]

    def _find_place(self, stream: IO[bytes], size: int) -> None:
        """Behind the lines that the file has in common with the one before."""
        self._began = min(self._began, size)
        stream.seek(self._began)
        common = itertools.takewhile(lambda pair: hash(pair[0]) == pair[1], zip(stream, self._lines, strict=False))
        kept = [len(line) for line, _ in common]
        self._read, self._lines = self._began + sum(kept), self._lines[: len(kept)]


def _is_run(place: Path) -> bool:
    """STATUS and metrics.jsonl are a run's alone; others have a config.yaml too."""
    try:
        found = {name for name in SIGNS if (place / name).is_file()}
    except OSError:
        return False
    return bool(found & {"STATUS", "metrics.jsonl"}) or {"config.yaml", "env.json"} <= found


def _inside(root: Path) -> list[Path]:
    return [place for place in root.iterdir() if place.is_dir()]


def _run(name: str) -> Path:
    place = Path(name)
    if not place.is_dir():
        raise UserError(f"{place} is no directory of a run")
    if not _is_run(place):
        inside = ", ".join(sorted(str(other) for other in _inside(place) if _is_run(other))[:5])
        raise UserError(f"{place} is no run: it has no STATUS{f'; in it are {inside}' if inside else ''}")
    return place


def _row(place: Path, newest: float = 0.0) -> Row:
    """What the files of a run say; `newest` is the latest time that was seen on its file system."""
    status, config = _object(place / "STATUS"), _yaml(place / "config.yaml")
    lines = _lines(place, TAIL_BYTES)
    state, age = str(status.get("state", "unknown")), _age(place, status, newest)
    lives = state not in (*ENDED, "unknown") and status.get("exit_code") is None
    reason = str(status.get("reason") or "")
    step = _whole(status.get("step"))
    if (lives and "time" not in status) or step is None:  # before there was a heartbeat STATUS stayed as it began
        step = max((_whole(line.get("step")) or 0 for line in lines), default=step)
    if lives and age is not None and age > SILENT_SECONDS:
        state, reason = "stopped responding", f"{state} at step {step}, and nothing since"
    return Row(
        str(place), state, step, _whole(config.get("steps")), _last(lines, "train/loss"),
        _last(lines, "perf/tokens_per_second"), _float(status.get("goodput")), age, reason,
    )  # fmt: skip


def _age(place: Path, status: Mapping[str, Any], newest: float) -> float | None:
    """Seconds since STATUS was written, by the clock of its file system, which need not be ours.

    The newest time that was seen there is not in the future. Where all that the run has written looks older than the
    time in its STATUS, which the run's host wrote, that clock is behind.
    """
    times, now = _times(place), time.time()
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


def _times(place: Path) -> dict[str, float]:
    """When each of a run's files was written, and the directory last changed."""
    found = {}
    for name in SIGNS:
        with contextlib.suppress(OSError):
            found[name] = (place / name).stat().st_mtime
    return found


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where it is not there, or damaged."""
    with contextlib.suppress(OSError):
        return _parsed(file.read_bytes()) or {}
    return {}


def _yaml(file: Path) -> dict[str, Any]:
    """The same of YAML."""
    try:
        found = YAML(typ="safe").load(file.read_bytes())
    except (OSError, ValueError, RecursionError, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None: it is not whole, or no object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _lines(run: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    return _Feed(run / "metrics.jsonl").more(last_bytes)


def _last(lines: list[dict[str, Any]], name: str) -> float | None:
    return next((value for line in reversed(lines) if (value := _float(line.get(name))) is not None), None)


def _losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: loss for line in lines if (loss := _float(line.get("train/loss"))) is not None}


def _float(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(when: Any) -> float | None:
    """Of the epoch, from such a number or an ISO date."""
    try:
        return datetime.fromisoformat(when).timestamp() if isinstance(when, str) else _float(when)
    except (ValueError, OverflowError, OSError):  # no date, or one that no clock shows
        return None


def _flat(values: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """`a.b` -> leaf."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{below}": leaf for below, leaf in _flat(value).items()}
        elif key not in skip:
            flat[str(key)] = value
    return flat


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}


def _parting(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, Any]:
    """`common` steps, how many are `equal` before the first that is not (`step`, with the loss of each)."""
    common = sorted(a.keys() & b.keys())
    differ = [s for s in common if a[s] != b[s] and not (math.isnan(a[s]) and math.isnan(b[s]))]
    if not differ:
        return {"common": len(common), "equal": len(common), "step": None, "last": common[-1] if common else None}
    step = differ[0]
    return {"common": len(common), "equal": common.index(step), "step": step, "a": a[step], "b": b[step]}


def _parting_line(found: Mapping[str, Any]) -> str:
    if not found["common"]:
        return "losses: no step was logged by both"
    if found["step"] is None:
        return f"losses: the same in all {found['common']} steps that both logged, the last {found['last']}"
    a, b = found["a"], found["b"]
    return f"losses: the same in {found['equal']} logged steps, and from step {found['step']} on not: {a!r} and {b!r}"


def _evaluations(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """eval/* of the last line of each that has them, and its step."""
    last: list[dict[str, Any]] = [
        next((line for line in reversed(lines) if "eval/loss" in line), {}) for lines in (a, b)
    ]
    keys = dict.fromkeys(key for line in last for key in line if key == "step" or key.startswith("eval/"))
    return {key: (last[0].get(key), last[1].get(key)) for key in keys}


def _told(line: Mapping[str, Any], steps: int | None) -> str:
    """A line of metrics.jsonl as a run says it itself."""
    step, total = line["step"], steps or line["step"]
    try:
        if "train/loss" in line and "train/learning_rate" in line:
            return train_line(step, total, line, (total - step) * (line.get("perf/step_seconds") or math.nan))
        if "eval/loss" in line:
            names = (key.removeprefix("eval/").removesuffix("/loss") for key in line if key != "eval/loss")
            return eval_lines(step, line, [name for name in names if f"eval/{name}/loss" in line])
        if "checkpoint/bytes" in line:
            return f"checkpoint {step}: {line['checkpoint/bytes'] / 1e6:.1f} MB in {line['checkpoint/seconds']:.1f} s"
    except (KeyError, TypeError, ValueError, OverflowError):
        pass  # a line of another version: as it is
    values = (f"{key} {_number(value)}" for key, value in line.items() if key not in ("step", "time", "attempt"))
    return f"step {step}: {', '.join(values)}"


def _standing(row: Row) -> str:
    """The state of a run in a line."""
    ago = "" if row.age is None else f" ({age(row.age)} ago)"
    return f"{row.state}{ago}{f': {row.reason}' if row.reason else f' at step {row.step}'}"


def _cells(row: Row) -> tuple[str, ...]:
    step = "-" if row.step is None else f"{row.step}/{row.steps}" if row.steps else str(row.step)
    speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
    goodput = "-" if row.goodput is None else f"{row.goodput:.1%}"
    loss = "-" if row.loss is None else f"{row.loss:.4f}"
    return Path(row.run).name, row.state, step, loss, speed, goodput, "-" if row.age is None else age(row.age)


def _shown(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _shown(value)


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()
