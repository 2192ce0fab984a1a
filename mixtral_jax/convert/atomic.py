"""A directory that appears under its name only when it is whole."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtral_jax.convert.files import Directory, PathLike

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def new_directory(destination: PathLike, *, needed_bytes: int, force: bool) -> Iterator[Directory]:
    """Gives an empty directory to fill; when the block ends well it is at `destination`, on disk.

    What is being written is called `.NAME.incomplete`; a killed run leaves it, and the next run clears it away. With
    `force` an existing directory is swapped for the new one in one step. A remote destination is filled in place, and
    the caller writes last what makes it complete.

    Raises:
        FileExistsError: there is a destination and `force` is not set.
        ValueError: the disk has too little space, or somebody else is writing the same destination.
    """
    directory = check_destination(destination, force=force)
    if directory.remote:
        yield directory
        return
    target = Path(os.path.abspath(directory.local))
    work = target.with_name(f".{target.name}.incomplete")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(work)
    try:
        _check_space(target.parent, needed_bytes)
        yield Directory(work)
        _sync_tree(work)
        _move(work, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    shutil.rmtree(work, ignore_errors=True)  # after an exchange: what was replaced


def check_destination(destination: PathLike, *sources: PathLike, force: bool, local: bool = False) -> Directory:
    """The refusals that need no look into the sources. `local`: an Orbax checkpoint is to be written.

    Raises:
        FileExistsError: the destination exists, and `force` is not set or cannot help.
        ValueError: it is a source, or lies inside one, or holds one; or it is remote and must not be.
    """
    directory = Directory(destination)
    if local and directory.remote:
        raise ValueError(
            f"{directory}: an Orbax checkpoint is written to a local disk only: convert here, then copy it there"
        )
    if directory.exists() and (directory.remote or not force):
        advice = "remove it first: a remote directory is not replaced" if directory.remote else "--force replaces it"
        raise FileExistsError(f"{directory} exists already; {advice}")
    for source in sources:
        if directory.remote or Directory(source).remote:
            continue
        a, b = (Path(os.path.realpath(Directory(p).local)) for p in (source, destination))
        if a == b or a in b.parents or b in a.parents:
            raise ValueError(f"source {source} and destination {destination} overlap: choose another destination")
    return directory


def check_survives(destination: PathLike, *read: PathLike) -> None:
    """Whether what is read beside the source, such as a base, is still there once the destination is replaced.

    Raises:
        ValueError: the destination is it, or holds it.
    """
    own = Directory(destination)
    for source in map(Directory, read):
        if not (own.remote or source.remote):
            a, b = (Path(os.path.realpath(directory.local)) for directory in (source, own))
            if a == b or b in a.parents:
                raise ValueError(f"{source} is read, and lies in destination {destination}: choose another destination")


def _claim(work: Path) -> int:
    """An empty work directory that is ours until the descriptor closes."""
    for _ in range(2):
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ValueError(f"{work} is being written by another process") from None
        for entry in os.scandir(work):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        if work.exists() and os.stat(work).st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)
    raise ValueError(f"{work} is being written by another process")


def _check_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"not enough disk space at {parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )


def _move(work: Path, target: Path) -> None:
    if os.path.lexists(target):
        try:
            _exchange(work, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
                raise
        shutil.rmtree(target)  # a file system without exchange: for a moment there is no destination, never half of one
    os.rename(work, target)


def _exchange(a: Path, b: Path) -> None:
    """renameat2(..., RENAME_EXCHANGE): both names change hands in one step (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, "renameat2")
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(b))


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for file in files:
            _sync(Path(directory) / file)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
