"""`report RUN…`: the page as a file, or served while the runs go on; and the one that a run leaves at its end."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.data.progress import meter
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.report.page import render
from mixtral_jax.train.report.run import read_run
from mixtral_jax.train.report.serve import serve
from mixtral_jax.train.report.thin import POINTS
from mixtral_jax.train.run_files import Advance, find_run

FILE = "report.html"
_FEWEST_POINTS = 60
_AT_ONCE = 50_000_000  # bytes, which take two seconds
_LARGE = ("metrics.jsonl", "moe.jsonl")


def report(runs: Sequence[str], *, out: str | None, watch: bool, port: int, smooth: int) -> None:
    """Write the page of these runs and say where it lies; with `watch` serve it instead.

    Raises:
        UserError: one of them is no run, or there is no place for the page.
    """
    places = list(dict.fromkeys(map(find_run, runs)))
    if smooth < 1:
        raise UserError(f"--smooth is {smooth}: a line is the mean over 1 point or more")
    if watch:
        serve(places, port, functools.partial(_page, places, smooth), functools.partial(print, flush=True))
        return
    file = Path(out or (places[0] / FILE if len(places) == 1 else FILE))
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--out {file} is {'a directory' if file.is_dir() else 'in no directory that there is'}")
    with meter("reading", sum(map(_size, places))) as advance:
        text = _page(places, smooth, "", advance)
    _write(file, text)
    print(file)


def write_page(place: Path) -> str:
    """At the end of a run; a sentence that says where it lies, or why there is none: it is no part of the run."""
    try:
        if (size := _size(place)) > _AT_ONCE:
            return f"the run's page: mixtral-jax report {place} makes it, of {size / 1e6:.0f} MB of metrics"
        _write(place / FILE, _page([place], 1, ""))
    except Exception as error:
        return f"the run's page could not be made: {type(error).__name__}: {error}"
    return f"the run's page: {place / FILE}"


def _page(places: Sequence[Path], smooth: int, script: str, advance: Advance | None = None) -> str:
    short = [place.resolve().name for place in places]
    names = short if len(set(short)) == len(short) else [str(place) for place in places]
    points = max(_FEWEST_POINTS, POINTS // len(places))
    runs = [read_run(place, name, points, advance) for place, name in zip(places, names, strict=True)]
    return render(runs, smooth=smooth, script=script)


def _size(place: Path) -> int:
    """Bytes of what takes time to read."""
    return sum(file.stat().st_size for name in _LARGE if (file := place / name).is_file())


def _write(file: Path, text: str) -> None:
    """So that a reader sees all of it or none."""
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
