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
from pathlib import Path
from typing import IO, Any

from mixtral_jax.train.console import age, eval_lines, train_line
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run_files import (
    ENDED,
    NAMES,
    TAIL_BYTES,
    Standing,
    differences,
    find_run,
    flat,
    is_run,
    json_object,
    number,
    parsed,
    runs_inside,
    standing,
    times_of,
    whole,
    yaml_object,
)

FOLLOW_SECONDS = 1.0


def ls(directory: str, *, as_json: bool = False) -> None:
    """The runs in a directory (or the one that it is), the newest first.

    Raises:
        UserError: there is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"{root} is no directory: say where runs are, such as runs")
    places = [root] if is_run(root) else runs_inside(root)
    newest = max((mtime for place in places for mtime in times_of(place).values()), default=0.0)
    rows = sorted(
        (standing(place, newest) for place in places), key=lambda row: math.inf if row.age is None else row.age
    )
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
    places = find_run(a), find_run(b)
    settings = [flat(yaml_object(place / "config.yaml"), skip=NAMES) for place in places]
    machines = [flat(json_object(place / "env.json"), skip=("command", "changed_settings")) for place in places]
    lines = [_Feed(place / "metrics.jsonl").more() for place in places]
    found = {
        "settings": differences(*settings),
        "environment": differences(*machines),
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
    place = find_run(run)
    if lines < 0:
        raise UserError(f"--lines is {lines}: a number of lines is 0 or more")
    steps, feed = whole(yaml_object(place / "config.yaml").get("steps")), _Feed(place / "metrics.jsonl")
    seen = feed.more(None if lines > 1000 else TAIL_BYTES)
    for line in seen[len(seen) - min(lines, len(seen)) :]:
        _say(_told(line, steps))
    row = standing(place)
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
        row = standing(place)  # before the lines: behind an end there are no more
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
        return [line for line in map(parsed, lines) if line and whole(line.get("step")) is not None]

    def _find_place(self, stream: IO[bytes], size: int) -> None:
        """Behind the lines that the file has in common with the one before."""
        self._began = min(self._began, size)
        stream.seek(self._began)
        common = itertools.takewhile(lambda pair: hash(pair[0]) == pair[1], zip(stream, self._lines, strict=False))
        kept = [len(line) for line, _ in common]
        self._read, self._lines = self._began + sum(kept), self._lines[: len(kept)]


def _losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: loss for line in lines if (loss := number(line.get("train/loss"))) is not None}


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


def _standing(row: Standing) -> str:
    """The state of a run in a line."""
    ago = "" if row.age is None else f" ({age(row.age)} ago)"
    return f"{row.state}{ago}{f': {row.reason}' if row.reason else f' at step {row.step}'}"


def _cells(row: Standing) -> tuple[str, ...]:
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
