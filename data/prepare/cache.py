"""What makes two preparations the same, where they are kept, and how only one process makes them.

An entry of the cache is a directory, named by what it was made of: files, and `meta.json`, which lists them. It is
written elsewhere and renamed when whole, so that a directory of that name is complete or does not exist. The name
covers the content of the input files (not their names or dates), the tokenizer, the way from record to row, the seed
and the format version.

Of a cache behind an address this machine keeps a part (`open_cache`). Entries are made here and then uploaded,
`meta.json` last; of those that others made, the files are fetched that somebody asks for.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.data.config import FrozenConfig
from mixtral_jax.data.records import (
    COPIED,
    META,
    digest,
    fetched,
    is_remote,
    join,
    kept,
    locked,
    put,
    read_small,
    remove_below,
    scratch,
    staging_room,
    stripe,
    write_atomically,
)
from mixtral_jax.data.rows import RowFormat

FORMAT_VERSION = 2
SIZES = "sizes.npy"
_ADDRESS = ".address"  # in the part of a cache that lies here: where the whole is
_THREADS, _STAMP_SECONDS = 8, 3600.0
_words: dict[tuple[Path, str], bytes] = {}  # see remember; for a cache that cannot be written


class PreparedSource(FrozenConfig):
    """A source as rows on disk, and what became of its records."""

    name: str
    fingerprint: str
    directory: str
    format: RowFormat
    shards: tuple[tuple[str, int, int], ...]  # (file name, rows, bytes)
    documents: int
    tokens: int  # in the rows, BOS and EOS included; the token that joins two pieces of a document counts twice
    targets: int  # tokens that are learned
    text_bytes: int = 0  # UTF-8 bytes of the text of documents
    split: int = 0  # documents in more than one row
    truncated: int = 0  # examples cut to a row
    dropped: int = 0  # examples with nothing left to learn
    empty: int = 0  # records without text
    layouts: dict[str, int] = {}  # records by the layout that they were read in
    control_words: int = 0  # examples whose text holds what looks like a control token
    bad: int = 0  # bad records passed over (on_error: skip)
    bad_examples: tuple[str, ...] = ()
    described: str = ""  # which files it was made of; not stored, as others of the same content may be named tomorrow

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(rows for _, rows, _ in self.shards)

    @property
    def padding(self) -> float:
        """Share of the places of all rows that hold no token."""
        return 1 - self.tokens / max(1, self.rows * (self.format.seq_len + 1))

    @property
    def paths(self) -> list[str]:
        """The shard files, in order."""
        return [os.path.join(self.directory, name) for name, _, _ in self.shards]

    def sizes(self) -> np.ndarray:
        """(rows, 2) uint32, mapped from disk: places of each row that hold a token, and UTF-8 bytes of their text.

        Of a document in several rows each has its bytes by its tokens: all rows sum to `text_bytes`. Examples have 0.
        """
        with fetched(Path(self.directory) / SIZES) as place:
            found: np.ndarray = np.load(place, mmap_mode="r")
        return found

    def save(self, directory: Path, made_of: Mapping[str, Any]) -> None:
        """Writes meta.json: all but the name, the place and the files; and for people what it was made of."""
        seal(directory, "rows", made_of, self.model_dump(exclude={"name", "directory", "described"}))


def load_prepared(cache_dir: Path, name: str, fingerprint: str) -> PreparedSource | None:
    """The prepared source, or None where there is none or a file is missing or has another size than it had."""
    meta = entry_meta(cache_dir, fingerprint[:24])
    if meta is None or meta.get("fingerprint") != fingerprint:
        return None
    known = {key: value for key, value in meta.items() if key in PreparedSource.model_fields}
    with contextlib.suppress(ValueError, TypeError):
        return PreparedSource(name=name, directory=str(cache_dir / fingerprint[:24]), **known)
    return None


# --- entries ---


def open_cache(place: str) -> Path:
    """The directory of a cache; of one behind an address, that of the part of it that this machine has."""
    if not is_remote(place):
        return Path(place)
    address = place.rstrip("/")
    local = staging_room()[0] / "caches" / digest(address)[:24]
    if address_of(local) != address:
        local.mkdir(parents=True, exist_ok=True)
        write_atomically(local / _ADDRESS, address)
    return local


def address_of(cache_dir: Path) -> str:
    """Where the whole of a cache is; nothing: here."""
    with contextlib.suppress(OSError):
        return (cache_dir / _ADDRESS).read_text()
    return ""


def seal(directory: Path, kind: str, made_of: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Writes the meta.json of an entry that is finished, and lists its files in it.

    Args:
        kind: `rows`, `documents`.
        made_of: source, tokenizer, length, seed and so on, for people who look at the cache.
    """
    own = directory / META  # may be there: of one that was killed before, or on another machine seals it at this moment
    found = [p for p in sorted(directory.rglob("*")) if p != own and p.is_file() and ".tmp-" not in p.name]
    files = {str(path.relative_to(directory)): path.stat().st_size for path in found}
    about = {"version": FORMAT_VERSION, "kind": kind, "made_of": dict(made_of), "made": int(time.time())}
    write_atomically(own, json.dumps({**about, "files": files, **meta}, indent=1))


def settle(made: Path, place: Path) -> None:
    """Gives a finished directory its name. Where another process was first, its one stays if whole: it may be read."""
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return os.rename(made, place)
        except OSError:
            if not made.exists() or (place.parent.exists() and not place.exists()):
                raise
        if whole(place):
            return shutil.rmtree(made)
        remove(place)


def remove(directory: Path) -> None:
    """Removes an entry at once for whoever looks: a half-removed one must not pass for a whole one."""
    doomed = scratch(directory)
    with contextlib.suppress(FileNotFoundError):  # another process was first
        os.rename(directory, doomed)
        doomed.unlink() if doomed.is_symlink() else shutil.rmtree(doomed, ignore_errors=True)


def read_meta(content: str | bytes) -> dict[str, Any] | None:
    """What a meta.json says; None: it is none, or of another version of the format."""
    try:
        meta = json.loads(content)
        return meta if meta["version"] == FORMAT_VERSION and isinstance(meta["files"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def whole(directory: Path) -> dict[str, Any] | None:
    """The meta.json of an entry whose files are all as long as they were, or can be fetched."""
    try:
        meta = read_meta((directory / META).read_bytes())
        is_copy = (directory / COPIED).exists()
        for name, size in meta["files"].items() if meta else ():
            path = directory / name
            if is_copy and path.exists() and path.stat().st_size != size:
                path.unlink()
            elif not is_copy and path.stat().st_size != size:
                return None
    except OSError:
        return None
    return meta


def entry_meta(cache_dir: Path, name: str) -> dict[str, Any] | None:
    """The meta.json of an entry that is whole; None where there is none. What is only here is uploaded.

    Raises:
        OSError: the address of the cache does not answer.
    """
    directory, address = cache_dir / name, address_of(cache_dir)
    here = whole(directory)
    if not address:
        return here
    content = read_small(join(address, f"{name}/{META}")) or b""
    meta = read_meta(content)
    if meta is None and here is not None and not (directory / COPIED).exists():
        with locked(cache_dir / "locks" / f"{name}.upload"):
            content = read_small(join(address, f"{name}/{META}")) or _upload(directory, join(address, name))
        meta = read_meta(content)
    if meta is None:
        if (directory / COPIED).exists():
            remove(directory)  # the copy of one that is there no more
        return None
    if here != meta or not (directory / COPIED).exists():
        directory.mkdir(parents=True, exist_ok=True)
        copied = {"address": join(address, name), "files": meta["files"]}
        write_atomically(directory / COPIED, json.dumps(copied))
        write_atomically(directory / META, content)
    return meta


def check_writable(cache_dir: Path) -> None:
    """Raises ValueError of a cache on a web server, to which nothing that is made can be added."""
    if (address := address_of(cache_dir)).startswith("http"):
        raise ValueError(
            f"data.cache_dir: {address} does not hold these rows, and web servers are only read from: prepare "
            "them where that directory can be written, or name another"
        )


def forget(cache_dir: Path, name: str) -> None:
    """Removes what is not needed any more, wherever it is."""
    remove(cache_dir / name)
    if address := address_of(cache_dir):
        with contextlib.suppress(OSError):
            remove_below(join(address, name))


def pull(directory: Path) -> None:
    """Fetches all that is missing of an entry, which from now on is no copy but this machine's own."""
    if (directory / COPIED).exists():
        files = json.loads((directory / META).read_bytes())["files"]
        with kept(directory), concurrent.futures.ThreadPoolExecutor(_THREADS) as pool, contextlib.ExitStack() as all_:
            list(pool.map(lambda file: all_.enter_context(fetched(directory / file)), files))
            (directory / COPIED).unlink()


def _upload(directory: Path, address: str) -> bytes:
    content = (directory / META).read_bytes()
    files = json.loads(content)["files"]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(put, directory / file, join(address, file)) for file in files]:
            done.result()
    put(directory / META, join(address, META))
    return content


class Use:
    """That somebody reads an entry: it is not removed until `end`, and is known to have been used just now.

    Both by a lock file beside the cache's others: its date is that of the last use. Of a cache that may only be read
    nobody knows.
    """

    def __init__(self, cache_dir: Path, name: str):
        self._file, self._stamped = -1, -math.inf
        path = use_file(cache_dir, name)
        for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, flags, 0o666)
                fcntl.flock(self._file, fcntl.LOCK_SH)
                break
        self.stamp()

    def stamp(self) -> None:
        """Notes the use, once an hour."""
        if (now := time.monotonic()) - self._stamped > _STAMP_SECONDS:
            self._stamped = now
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def end(self) -> None:
        """It is read no more."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    __del__ = end


def use_file(cache_dir: Path, name: str) -> Path:
    """Locked by those who use an entry; its date is that of the last use."""
    return cache_dir / "locks" / f"{name.replace('/', '.')}.use"


# --- small files ---


def recall(cache_dir: Path, name: str) -> bytes | None:
    """A small file of the cache, wherever it is; None: there is none."""
    with contextlib.suppress(FileNotFoundError):
        here = (cache_dir / name).read_bytes()
        with contextlib.suppress(OSError):  # one that may only be read
            os.utime(cache_dir / name)  # used just now
        return here
    content = read_small(join(address, name)) if (address := address_of(cache_dir)) else None
    if content is not None:
        (cache_dir / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache_dir / name, content)
    return content


def keep(cache_dir: Path, name: str, content: bytes) -> None:
    """Writes a small file to the cache, for all who share it."""
    (cache_dir / name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache_dir / name, content)
    if address := address_of(cache_dir):
        put(cache_dir / name, join(address, name))


def remember(cache_dir: Path, name: str, make: Callable[[], str]) -> str:
    """A word that the cache keeps for all; where it is not there one process makes it, others wait for that."""
    with contextlib.ExitStack() as held:
        if not (known := _words.get((cache_dir, name)) or recall(cache_dir, name)):
            with contextlib.suppress(OSError):  # a cache that may only be read
                held.enter_context(locked(stripe(cache_dir, name)))
            known = recall(cache_dir, name)
        if not known:
            known = make().encode()
            with contextlib.suppress(OSError, ValueError):  # the next process makes it again
                keep(cache_dir, name, known)
    _words[cache_dir, name] = known
    return known.decode()
