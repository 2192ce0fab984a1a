"""Files behind addresses as copies on this machine: each fetched once, whole or not at all, and no more than there is
room for. Whoever reads a copy again makes it the newest; the oldest go first.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mixtral_jax.data.progress import say

PAUSES = (1.0, 3.0, 9.0)  # seconds before each further attempt
ROOM = "MIXTRAL_JAX_STAGING"  # this process's staging directory and its bound, for the processes that it starts
START = "MIXTRAL_JAX_START"  # another one each time that data is prepared; for them too
_DIRECTORY = ".cache/mixtral-jax-staging"  # beside the usual cache
_STRIPES = 64  # lock files
_SILENCE_SECONDS = 3600.0
COPIED = ".copied"  # in a directory whose files can be fetched again: its address, and their sizes
META = "meta.json"  # of an entry of the cache: what it is, and its files
# what no second attempt changes; of any other kind may be whatever a client of an object store raises
_FINAL = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError, TypeError,
    LookupError, AttributeError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError,
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
T = TypeVar("T")
_say_once = functools.cache(say)


def digest(value: Any) -> str:
    """Hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def _kernel() -> str:
    """Which start of which machine this is: all its containers see each other's locks."""
    try:
        return digest(Path("/proc/sys/kernel/random/boot_id").read_text())[:8]
    except OSError:
        return digest(os.uname().nodename)[:8]


def scratch(path: Path) -> Path:
    """A name beside `path` that no other process has, on whatever host and with whatever number."""
    return path.with_name(f"{path.name}.tmp-{_kernel()}-{os.urandom(8).hex()}")


def clear_scratch(path: Path) -> None:
    """Removes what is left beside `path` by processes that are gone; whoever calls this holds the lock of `path`.

    A machine that does not see the lock may write there at this moment: what is of another one goes after an hour
    in which nothing was written.
    """
    for dead in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        with contextlib.suppress(OSError):  # it goes by itself just now
            newest = max(file.stat().st_mtime for file in [dead, *dead.rglob("*")])
            if f".tmp-{_kernel()}-" in dead.name or time.time() - newest > _SILENCE_SECONDS:
                shutil.rmtree(dead) if dead.is_dir() else dead.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a small file so that a reader sees all of it or none."""
    temporary = scratch(path)
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def replace_or_overwrite(path: Path, content: str) -> None:
    """The same, and on a full disk over what stands there, whose blocks are its own: of ASCII, and for few readers."""
    try:
        write_atomically(path, content)
    except OSError as error:
        if error.errno not in (*_FULL, errno.EFBIG) or not path.exists():
            raise
        with path.open("r+") as file:
            file.truncate(file.write(content))


@contextlib.contextmanager
def locked(path: Path, waiting: str = "", say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Holds a lock file; the system drops the lock when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def stripe(root: Path, what: str) -> Path:
    """The lock file of `what`, which is one of few that all share."""
    return root / "locks" / f"stripe-{int(digest(what)[:8], 16) % _STRIPES:02d}"


@contextlib.contextmanager
def kept(directory: Path) -> Iterator[Path]:
    """No copy in `directory` is dropped for others before the end of the block."""
    with open(directory / COPIED, "rb") as mark:
        fcntl.flock(mark, fcntl.LOCK_SH)
        yield directory


def patiently(what: str, action: Callable[[], T]) -> T:
    """action(), again after each of PAUSES where a network or a server refuses.

    Raises:
        OSError: it still refuses; a file that is not there or may not be read refuses at once.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except Exception as error:
            if isinstance(error, _FINAL) or getattr(error, "errno", None) in _FULL:
                raise
            why = str(error).partition("\n")[0][:300] or type(error).__name__
            if pause is None:
                raise OSError(errno.ETIMEDOUT, f"does not answer, or not as it should ({why})", what) from error
            say(f"{what}: {why}; trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def stage_in(directory: str | None, limit: int | None) -> None:
    """From now on copies of this process, and of those that it starts, lie in `directory`, at most `limit` bytes."""
    os.environ[START] = os.urandom(8).hex()
    os.environ[ROOM] = json.dumps([os.path.abspath(directory or _DIRECTORY), limit])


def staging_room() -> tuple[Path, int | None]:
    """Where copies lie, and how many bytes of them there may be; None: as many as leave a tenth of the disk free."""
    directory, limit = json.loads(os.environ.get(ROOM, f'["{os.path.abspath(_DIRECTORY)}", null]'))
    return Path(directory), limit


def stage(place: Path, size: int | None, fetch: Callable[[str], None], what: str) -> Path:
    """`place`, where a copy now lies: the one that was there, or what `fetch` writes to the name that it is given.

    Args:
        size: of the whole file; None: nobody knows.
    """
    with contextlib.suppress(OSError):
        os.utime(place)  # the newest of all now
        return place
    with locked(stripe(staging_room()[0], str(place))):
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            make_room(size or 0)
            patiently(what, functools.partial(_fetch, place, size, fetch))
    return place


def _fetch(place: Path, size: int | None, fetch: Callable[[str], None]) -> None:
    temporary = scratch(place)
    try:
        fetch(str(temporary))
        if size is not None and (found := temporary.stat().st_size) != size:
            raise OSError(f"{found:,} of {size:,} bytes arrived")
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def has_room(size: int) -> bool:
    """Whether copies of so many bytes can be here at all."""
    root, limit = staging_room()
    there = next(place for place in (root, *root.parents) if place.is_dir())
    return size <= (limit or shutil.disk_usage(there).total * 9 // 10)


def make_room(size: int) -> None:
    """Drops copies until `size` bytes more are within the bound: the longest unread first, none that is kept."""
    root, limit = staging_room()
    copies = sorted(_copies(root))
    disk = shutil.disk_usage(root)
    excess = size + (sum(copy[1] for copy in copies) - limit if limit else disk.total // 10 - disk.free)
    for _, of_it, path, above in copies:
        if excess <= 0:
            return
        with contextlib.suppress(OSError), open(os.path.join(above, COPIED), "r+b") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Path(path).unlink(missing_ok=True)  # another process drops them too
            excess -= of_it
    if limit and excess > 0:
        _say_once(f"data.staging_bytes ({limit:,}) is {excess:,} bytes less than the copies that are read at once")


def _copies(root: Path) -> Iterator[tuple[float, int, str, str]]:
    """(last read, bytes, path, the directory that is marked) of everything that can be fetched again."""
    for above, folders, names in os.walk(root):
        if COPIED not in names:
            continue
        folders.clear()
        for path in Path(above).rglob("*"):
            with contextlib.suppress(OSError):
                found = path.stat()
                is_underway = ".tmp-" in path.name and time.time() - found.st_mtime < _SILENCE_SECONDS
                if path.name not in (COPIED, META) and stat.S_ISREG(found.st_mode) and not is_underway:
                    yield found.st_mtime, found.st_size, str(path), above
