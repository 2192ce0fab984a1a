"""What a cache holds, how large and how long unused it is; and how entries are removed that nobody uses."""

import contextlib
import fcntl
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixtral_jax.data.prepare.cache import FORMAT_VERSION, META, open_cache, remove, use_file, whole
from mixtral_jax.data.records import COPIED, is_remote, join, read_small, remove_below, sizes_below, staging_room

_NAME = re.compile(r"[0-9a-f]{24}")
_UNFINISHED = re.compile(r"(?P<name>[0-9a-f]{24})\.((part-\d+-of-\d+\.)?tmp-|(?P<parts>parts-of-)\d+$)")


@dataclass(frozen=True)
class Entry:
    """One thing in a cache that can be removed by itself."""

    id: str
    kind: str  # documents, rows, references, hashes; copies: of what lies behind addresses
    made_of: str  # source, tokenizer, length, seed, as far as it says that
    bytes: int
    made: float | None  # seconds since 1970; None: not known
    used: float | None  # the same
    state: str  # whole, in use, unfinished, damaged, not readable, of format N, a copy
    place: str  # directory or address


def entries(cache: str) -> list[Entry]:
    """Everything in a cache, and what this machine has copied from behind addresses; the largest first."""
    found = list(_copies(staging_room()[0] / "copies"))
    if is_remote(cache):
        found += [*_behind(cache.rstrip("/")), *(replace(e, id=f"here/{e.id}") for e in _below(open_cache(cache)))]
    else:
        found += _below(Path(cache))
    return sorted(found, key=lambda entry: (-entry.bytes, entry.id))


def drop(entry: Entry) -> bool:
    """Removes one; False: a process uses it, and it stays."""
    if is_remote(entry.place):
        remove_below(entry.place)
        return True
    place = Path(entry.place)
    with _unused(place) as free:
        if free:
            remove(place)
    return free


@contextlib.contextmanager
def _unused(place: Path) -> Iterator[bool]:
    """Whether no process reads an entry, or makes what an unfinished one is to become; none begins to in the block."""
    inside, unfinished = place.parent.name == "references", _UNFINISHED.match(place.name)
    name = "references." * inside + (unfinished["name"] if unfinished else place.name)
    with contextlib.ExitStack() as held:
        free = True
        try:
            for lock in sorted((place.parents[inside] / "locks").glob(f"{name}*")):
                fcntl.flock(held.enter_context(open(lock, "rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # of what nobody lets us ask, nobody knows
            free = False
        yield free


def _below(root: Path) -> Iterator[Entry]:
    """Of a directory of this machine; what a cache has not made is passed over."""
    for place in sorted([*root.glob("*"), *root.glob("references/*")]):
        unfinished = _UNFINISHED.match(place.name)
        if not place.is_dir() or not (unfinished or _NAME.fullmatch(place.name) or place == root / "hashes"):
            continue
        try:
            yield _entry(root, place, (unfinished["parts"] or "") if unfinished else None)
        except FileNotFoundError:
            continue  # another process removes it, or gives it its name
        except PermissionError:
            yield Entry(place.relative_to(root).as_posix(), "?", "", 0, None, None, "not readable", str(place))


def _entry(root: Path, place: Path, parts: str | None) -> Entry:
    """One entry of a cache; `parts` is None of what has its name."""
    files = _files_below(place)
    newest = max((file.st_mtime for file in files), default=place.stat().st_mtime)
    name = place.relative_to(root).as_posix()
    entry = Entry(name, "?", "", sum(file.st_size for file in files), newest, newest, "unfinished", str(place))
    if place.name == "hashes":
        return replace(entry, kind="hashes", made_of=f"{len(files):,} files", made=None, state="whole")
    if parts is None and (place / META).exists():
        entry = _described(entry, (place / META).read_bytes(), len(files))
        with contextlib.suppress(OSError):
            entry = replace(entry, used=use_file(root, name).stat().st_mtime)
        if entry.state == "whole" and entry.kind != "references" and whole(place) is None:
            entry = replace(entry, state="damaged")
        elif (place / COPIED).exists():
            entry = replace(entry, state="a copy")
    elif parts:
        there = sorted(part.name.removeprefix("part-") for part in place.glob("part-*") if "tmp" not in part.name)
        about = f"parts {', '.join(there) or 'none'} of {name.rpartition('-')[2]}"
        entry = replace(entry, kind="documents", made_of=about)
    with _unused(place) as free:
        return entry if free else replace(entry, state="in use")


def _files_below(place: Path) -> list[os.stat_result]:
    """What is known of each file, also while other processes remove some."""
    found = []
    for above, _, names in os.walk(place):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.append(os.stat(os.path.join(above, name)))
    return found


def _described(entry: Entry, content: bytes, files: int) -> Entry:
    """An entry with what its meta.json says."""
    try:
        meta: dict[str, Any] = json.loads(content)
        if entry.id.startswith("references/"):
            state = "whole" if files > 1 else "unfinished"
            return replace(entry, kind="references", made_of=f"of rows {meta['rows'][:24]}", state=state)
        version = meta["version"]
        about = ", ".join(f"{key} {value}" for key, value in meta.get("made_of", {}).items())
        made, kind = meta.get("made", entry.made), meta.get("kind", "rows")
        state = "whole" if version == FORMAT_VERSION else f"of format {version}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return replace(entry, state="damaged")
    return replace(entry, kind=kind, made_of=about, made=made, used=made, state=state)


def _behind(address: str) -> Iterator[Entry]:
    """Of a cache behind an address, where nobody knows who uses what."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for path, size in sizes_below(address).items():
        depth = 2 if path.startswith("references/") else 1
        found["/".join(path.split("/")[:depth])][path] = size
    for name, files in sorted(found.items()):
        place = join(address, name)
        entry = Entry(name, "?", "", sum(files.values()), None, None, "unfinished", place)
        if name == "hashes":
            yield replace(entry, kind="hashes", made_of=f"{len(files):,} files", state="whole")
        elif content := read_small(join(place, META)) if f"{name}/{META}" in files else None:
            yield replace(_described(entry, content, len(files)), used=None)
        elif _NAME.match(name.rpartition("/")[2]):
            yield entry


def _copies(root: Path) -> Iterator[Entry]:
    """What this machine has copied of sources and tokenizers."""
    for mark in sorted(root.glob(f"*/{COPIED}")):
        with contextlib.suppress(FileNotFoundError):  # as above
            what, made = json.loads(mark.read_bytes())["address"], mark.stat().st_mtime
            files, place = _files_below(mark.parent), mark.parent
            size, newest = sum(file.st_size for file in files), max(file.st_mtime for file in files)
            yield Entry(f"copies/{place.name}", "copies", what, size, made, newest, "a copy", str(place))
