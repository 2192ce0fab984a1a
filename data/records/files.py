"""Files to be read, on this machine or behind an address that fsspec knows (`gs://`, `s3://`, `hf://`, ...)."""

import contextlib
import errno
import glob
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec

_POINTER = b"version https://git-lfs.github.com/spec/"


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path


def own_name(path: str) -> str:
    """The path without what an address is inside of: `zip://a.jsonl::b.zip` is a.jsonl."""
    return path.partition("::")[0] if is_remote(path) else path


@contextlib.contextmanager
def open_file(path: str) -> Iterator[Any]:
    """The bytes of a file, as a stream that can seek.

    Raises:
        OSError: it cannot be read, or is inside an archive that is damaged.
    """
    try:
        with fsspec.open(path, "rb") if is_remote(path) else open(path, "rb") as stream:
            yield stream
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise OSError(errno.EIO, str(error), path) from None


def file_system(address: str) -> tuple[Any, str]:
    """What reads an address, and the name that it has there.

    Raises:
        ValueError: no library that is installed reads addresses of this kind.
    """
    try:
        return fsspec.core.url_to_fs(address)
    except Exception as error:  # each scheme has kinds of its own: no library for it, no archive, no permission
        raise ValueError(f"{address} cannot be read: {error or type(error).__name__}") from None


def file_size(path: str) -> int:
    """Bytes of a file as it is stored."""
    if not is_remote(path):
        return os.path.getsize(path)
    fs, name = file_system(path)
    return fs.size(name) or 0  # None: a server that does not say


def can_seek(path: str) -> bool:
    """Whether a file can be read from its middle without what is before it."""
    if "::" in path:
        return False  # inside an archive
    try:
        with open_file(path) as stream:
            stream.seek(1)  # of http, a server without ranges
            return True
    except (OSError, ValueError):
        return False


def file_identity(path: str) -> list[Any]:
    """Its size, and what changes when its content may have changed."""
    if not is_remote(path):
        found = os.stat(path)
        return [found.st_size, os.path.abspath(path), found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    fs, name = file_system(path)
    return [file_size(path), path, str(fs.info(name))]


def check_file(path: str) -> str:
    """`path`, where it is a file that holds what its name says. A pipe is not opened: that would wait for ever.

    Raises:
        ValueError: a link to nothing, a pipe, a device, or a pointer of Git LFS.
    """
    if not is_remote(path):
        if os.path.islink(path) and not os.path.exists(path):
            raise ValueError(f"{path} is a link to nothing: {os.readlink(path)} is not there")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path} is no regular file (a pipe, a device?), and nothing else is read")
    if file_size(path) < 1024:  # as a pointer is: of larger files nothing is read here
        with open_file(path) as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{path} is a pointer of Git LFS, not the file: run git lfs pull in its directory")
    return path


def is_directory(path: str) -> bool:
    """Whether a path has files below it. Servers of http have no directories."""
    if not is_remote(path):
        return os.path.isdir(path)
    fs, name = file_system(path)
    return not path.startswith("http") and fs.isdir(name)


def exists(path: str) -> bool:
    """Whether there is something; a link to nothing is."""
    if not is_remote(path):
        return os.path.lexists(path)
    fs, name = file_system(path)
    return fs.exists(name)


def join(directory: str, name: str) -> str:
    """The path of a name below a directory; of `zip://a::b.zip` the first part grows."""
    first, *others = directory.split("::")
    between = "" if not first or first.endswith("/") else "/"
    return "::".join([f"{first}{between}{name}" if name else first, *others])


def files_below(directory: str) -> list[str]:
    """Relative names of all files below a directory, sorted. Links are followed; what is hidden is passed over."""
    if is_remote(directory):
        fs, root = file_system(directory)
        return _visible(name.removeprefix(root).strip("/") for name in fs.find(root))
    been, found = {os.path.realpath(directory)}, []
    for above, folders, names in os.walk(directory, followlinks=True):
        places = {os.path.realpath(os.path.join(above, folder)): folder for folder in sorted(folders, reverse=True)}
        folders[:] = [folder for place, folder in places.items() if place not in been]
        been.update(places)
        found += [os.path.relpath(os.path.join(above, name), directory) for name in names]
    return _visible(found)


def distinct(paths: Iterable[str]) -> list[str]:
    """The paths without those that lead to where an earlier one leads, as links and other spellings do."""
    places = {path: path if is_remote(path) else os.path.realpath(path) for path in paths}
    first = {place: path for path, place in reversed(places.items())}
    return [path for path, place in places.items() if first[place] == path]


def split_glob(path: str) -> tuple[str, str]:
    """A path as the directory above its first wildcard and the pattern below that; a pattern of "" is none."""
    first, *others = path.split("::")
    scheme, colon, rest = first.rpartition("://")
    wildcard = None if scheme.startswith("http") else re.search(r"[*?[]", rest)
    if wildcard is None:
        return path, ""
    root, slash, _ = rest[: wildcard.start()].rpartition("/")
    above = scheme + colon + (root or slash * (not scheme))
    return "::".join([above, *others]), rest[len(root + slash) :]


def matching(directory: str, pattern: str) -> list[str]:
    """Relative names of the files and directories that a glob matches, sorted."""
    if not is_remote(directory):
        return sorted(glob.glob(pattern, root_dir=directory or None, recursive=True))
    fs, root = file_system(directory)
    return sorted(name.removeprefix(root).strip("/") for name in fs.glob(f"{root}/{pattern}".lstrip("/" * (not root))))


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not any(part.startswith((".", "__")) for part in name.split("/")))
