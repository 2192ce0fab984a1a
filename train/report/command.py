"""`report RUN…`: the page as a file, or served while the runs go on; and the one that a run leaves at its end."""

import contextlib
import errno
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.data.progress import meter
from mixtral_jax.data.records import write_atomically
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
_READ = (*_LARGE, "samples/*", "eval/*/*.json")
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def report(runs: Sequence[str], *, out: str | None, watch: bool, port: int, smooth: int) -> None:
    """Write the page of these runs and say where it lies; with `watch` serve it instead.

    Raises:
        UserError: one of them is no run, or there is no place for the page.
    """
    places = list(dict.fromkeys(map(find_run, runs)))
    if smooth < 1:
        raise UserError(f"--smooth is {smooth}: a line is the mean over 1 point or more")
    if port and not watch:
        raise UserError("--port is for --watch, which is not there")
    if watch:
        if out is not None:
            raise UserError("--watch serves the page and writes none: leave out --out")
        serve(places, port, functools.partial(_page, places, smooth), functools.partial(print, flush=True))
        return
    file = Path(out or (places[0] / FILE if len(places) == 1 else FILE))
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--out {file} is {'a directory' if file.is_dir() else 'in no directory that there is'}")
    with meter("reading", sum(_size(place, _LARGE) for place in places)) as advance:
        text = _page(places, smooth, "", advance)
    try:
        write_atomically(file, text)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        raise UserError(f"{file} cannot be written ({error.strerror}): --out says where the page is to lie") from error
    print(file)


def promise_page(place: Path) -> str:
    """A sentence for the end of a run: where its page will lie, or that there is too much to read."""
    if (size := _size(place, _READ)) > _AT_ONCE:
        return f"the run's page: mixtral-jax report {place} makes it, of {size / 1e6:.0f} MB of metrics"
    return f"the run's page: {place / FILE}"


def write_page(place: Path) -> str:
    """What was promised; a sentence where it could not be made, as it is no part of the run, else nothing."""
    try:
        if _size(place, _READ) <= _AT_ONCE:
            write_atomically(place / FILE, _page([place], 1, ""))
    except Exception as error:
        return f"the run's page could not be made: {type(error).__name__}: {error}"
    return ""


def _page(places: Sequence[Path], smooth: int, script: str, advance: Advance | None = None) -> str:
    short = [place.resolve().name for place in places]
    names = short if len(set(short)) == len(short) else [str(place) for place in places]
    points = max(_FEWEST_POINTS, POINTS // len(places))
    runs = [read_run(place, name, points, advance) for place, name in zip(places, names, strict=True)]
    return render(runs, smooth=smooth, script=script)


def _size(place: Path, names: Sequence[str]) -> int:
    """Bytes of what takes time to read."""
    size = 0
    for file in itertools.chain.from_iterable(map(place.glob, names)):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    return size
