"""`data cache ls` and `rm`: what prepared data there is, and room for more of it."""

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare import Entry, drop, entries
from mixtral_jax.data.records import is_remote, stage_in
from mixtral_jax.train.config import load_config
from mixtral_jax.train.errors import ExitCode, UserError

_DAYS = {"h": 1 / 24, "d": 1, "w": 7}


def ls(config: str | None, *, cache_dir: str | None = None, as_json: bool = False) -> int:
    """Everything in a cache, the largest first, and its total."""
    place, found = _look(config, cache_dir)
    if as_json:
        print(json.dumps({"cache": place, "bytes": sum(e.bytes for e in found), "entries": [asdict(e) for e in found]}))
        return ExitCode.DONE
    if not found:
        print(f"{place}: nothing is there")
        return ExitCode.DONE
    table = Table("id", "kind", "made of", "size", "made", "last use", "state", box=None, pad_edge=False)
    for each in found:
        times = _ago(each.made), _ago(each.used)
        table.add_row(_short(each, found), each.kind, each.made_of, _size(each.bytes), *times, each.state)
    width = None if sys.stdout.isatty() else 10_000  # for grep, a line each
    Console(width=width, highlight=False, soft_wrap=True, markup=False).print(table)
    print(f"{place}: {len(found):,} entries, {_size(sum(each.bytes for each in found))}")
    return ExitCode.DONE


def rm(
    ids: Sequence[str], *, cache_dir: str | None = None, unused_for: str | None = None, unfinished: bool = False,
    everything: bool = False, yes: bool = False, dry_run: bool = False, as_json: bool = False,
) -> int:  # fmt: skip
    """Removes entries that no living process uses: those named, and those of the kinds that are asked for.

    Raises:
        UserError: nothing is chosen, an id is of none or of several, one that is named is in use, or nobody said yes.
    """
    files = [word for word in ids if word.endswith((".yaml", ".yml"))]
    days = None if unused_for is None else _days(unused_for)
    names = [word for word in ids if word not in files]
    if len(files) > 1:
        raise UserError(f"{' and '.join(files)} are two run files: name one, for its data.cache_dir")
    if not (names or unfinished or everything or days is not None):
        raise UserError(
            "name ids of entries (mixtral-jax data cache ls), or say --unused-for 30d, --unfinished or --all"
        )
    place, found = _look(files[0] if files else None, cache_dir)
    if days is not None and is_remote(place):
        raise UserError(f"--unused-for: of {place}, behind an address, nobody knows what was used when: name ids")
    named = [_named(name, found, place) for name in names]
    chosen = [
        each
        for each in found
        if each in named
        or everything
        or (unfinished and each.state in ("unfinished", "damaged"))
        or (days is not None and each.used and each.state != "in use" and time.time() - each.used > days * 86400)
    ]
    if used := [each.id for each in named if each.state == "in use"]:
        raise UserError(
            f"{', '.join(used)} of {place} is used by a process that lives: end that first; nothing is removed"
        )
    freed, kept = _drop(chosen, place, yes=yes, dry_run=dry_run, quiet=as_json)
    if as_json:
        result = {"cache": place, "removed": [e.id for e in freed], "bytes": sum(e.bytes for e in freed)}
        print(json.dumps({**result, "in_use": kept, "dry_run": dry_run}))
    if kept:
        raise UserError(f"{', '.join(kept)} of {place} stays: a process that lives uses it")
    return ExitCode.DONE


def _drop(chosen: list[Entry], place: str, *, yes: bool, dry_run: bool, quiet: bool) -> tuple[list[Entry], list[str]]:
    """What was removed (or would be), and the ids of what stays because it is used."""
    say = (lambda line: None) if quiet else print
    free = [each for each in chosen if each.state != "in use"]
    kept = [each.id for each in chosen if each.state == "in use"]
    total = f"{len(free):,} entries, {_size(sum(each.bytes for each in free))}"
    for each in free:
        say(f"{each.id}  {each.kind}  {each.made_of}  {_size(each.bytes)}  {each.state}")
    if dry_run or not free:
        say(f"{place}: {'would free' if dry_run else 'nothing to remove:'} {total}")
        return free, kept
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"{place}: {total} would be removed, and nobody can be asked here: say --yes, or --dry-run")
        if input(f"remove these {total}, from {place}? [y/N] ").strip().lower() not in ("y", "yes"):
            say("nothing is removed")
            return [], []
    freed = [each for each in free if drop(each)]
    kept += [each.id for each in free if each not in freed]
    say(f"{place}: freed {len(freed):,} entries, {_size(sum(each.bytes for each in freed))}")
    return freed, kept


def _look(config: str | None, cache_dir: str | None) -> tuple[str, list[Entry]]:
    """The cache that is meant, and what is in it.

    Raises:
        UserError: there is no such directory.
    """
    data = None if config is None else load_config(config, []).config.data
    place = cache_dir or (data.cache_dir if data else DataConfig.model_fields["cache_dir"].default)
    stage_in(data.staging_dir if data else None, None)
    if not is_remote(place) and not Path(place).is_dir():
        raise UserError(f"there is no cache in {place}: name a run file, or a directory with --cache-dir")
    return place, entries(place)


def _named(word: str, found: list[Entry], place: str) -> Entry:
    """The one entry whose id begins with a word."""
    of_it = [each for each in found if each.id == word] or [each for each in found if each.id.startswith(word)]
    if len(of_it) == 1:
        return of_it[0]
    if not of_it:
        raise UserError(f"{place} has no entry {word!r}: mixtral-jax data cache ls names them")
    raise UserError(f"{word!r} is the beginning of {len(of_it)} ids: {', '.join(each.id for each in of_it[:4])}")


def _days(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text)
    if not found:
        raise UserError(f"--unused-for {text!r} is no time such as 30d, 12h or 4w")
    return float(found[1]) * _DAYS[found[2]]


def _short(entry: Entry, found: list[Entry]) -> str:
    """As much of an id as tells it from the others; at least 8 letters of its last part."""
    head, slash, last = entry.id.rpartition("/")
    if not re.fullmatch(r"[0-9a-f]{24}", last):
        return entry.id
    others = [each.id for each in found if each is not entry]
    length = next(n for n in range(8, 25) if n == 24 or not any(o.startswith(head + slash + last[:n]) for o in others))
    return head + slash + last[:length]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _ago(when: float | None) -> str:
    if when is None:
        return "-"
    hours = max(0.0, time.time() - when) / 3600
    units = ((60, "min"), (1, "h"), (1 / 24, "d"))
    scale, unit = units[(hours >= 2) + (hours >= 48)]
    return f"{scale * hours:.0f} {unit} ago"
