"""Files to be read, on this machine or behind an address that fsspec knows (`gs://`, `s3://`, `hf://`, ...)."""

import contextlib
import errno
import glob
import json
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from mixtral_jax.data.records.staging import (
    COPIED,
    META,
    START,
    digest,
    has_room,
    kept,
    locked,
    patiently,
    stage,
    staging_room,
    stripe,
    write_atomically,
)

_DEPTH = 4  # of folders in an entry of the cache
_POINTER = b"version https://git-lfs.github.com/spec/"
for _scheme in ("http", "https"):
    fsspec.register_implementation(_scheme, "mixtral_jax.data.records.http.WebFiles", clobber=True)


T = TypeVar("T")
_known: dict[tuple[str, str], dict[str, Any]] = {}  # by start and address: each look takes a while


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path


def own_name(path: str) -> str:
    """The path without what an address is inside of: `zip://a.jsonl::b.zip` is a.jsonl; and without a web query."""
    first = path.partition("::")[0] if is_remote(path) else path
    return re.sub(r"[?#].*", "", first) if first.startswith("http") else first


@contextlib.contextmanager
def open_file(path: str) -> Iterator[Any]:
    """The bytes of a file, as a stream that can seek; of one elsewhere, of its copy on this machine.

    Raises:
        OSError: it cannot be read, or is inside an archive that is damaged.
    """
    try:
        with _opened(path) as stream:
            yield stream
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise OSError(errno.EIO, str(error), path) from None


def _opened(path: str) -> Any:
    if not is_remote(path):
        return open(path, "rb")
    if not has_room(file_identity(path)[0] or 0):
        return fsspec.open(path, "rb")
    with local_copy(path) as copy:
        return open(copy, "rb")


def cannot_read(path: str, error: Exception, how: str = "") -> Exception:
    """What to raise of a file that cannot be read: a sentence, but the error where the other side does not answer."""
    if isinstance(error, OSError) and error.errno in (errno.ETIMEDOUT, errno.ESTALE, errno.ENOSPC, errno.EDQUOT):
        return error
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ValueError(f"{path} cannot be read{how}: {said.splitlines()[0]}")


@contextlib.contextmanager
def _copies(made_of: Any, about: dict[str, Any]) -> Iterator[Path]:
    """The directory of the copies of what `made_of` tells from all else; they stay until the end of the block."""
    directory = staging_room()[0] / "copies" / digest(made_of)[:24]
    if not (directory / COPIED).exists():
        with locked(stripe(staging_room()[0], str(directory))):  # written once: it is what `kept` locks
            directory.mkdir(parents=True, exist_ok=True)
            if not (directory / COPIED).exists():
                write_atomically(directory / COPIED, json.dumps(about))
    with kept(directory):
        yield directory


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A file of this machine with the content of `path`: itself, or a copy that is made now, or was made before.

    A copy that is not opened may be dropped behind the block.

    Raises:
        OSError: it cannot be fetched.
    """
    if not is_remote(path):
        yield path
        return
    identity, name = file_identity(path), os.path.basename(own_name(path))[-100:]
    with _copies(identity, {"address": path}) as directory:
        place = directory / (name if name.strip(".") else "file")
        yield str(stage(place, identity[0], lambda to: _get(path, to), path))


@contextlib.contextmanager
def local_directory(path: str, names: Iterable[str] | None = None) -> Iterator[str]:
    """The same of a directory, with all that is below it or, of an address, with those of `names` that are there."""
    if not is_remote(path):
        yield path
        return
    known = _below(path) if names is None else {n: it for n in names if (it := _info(join(path, n)))}
    about = {"address": path, "files": {name: it["size"] for name, it in known.items()}}
    with _copies([path, str(known)], about) as directory:
        for name in known:
            with fetched(directory / name):
                pass
        yield str(directory)


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """`path`, which is fetched where it is missing and can be: a directory above it is a copy of one elsewhere.

    It may be dropped again where it is not opened in the block.

    Raises:
        OSError: it cannot be fetched.
    """
    above = next((directory for directory in path.parents[:_DEPTH] if (directory / COPIED).exists()), None)
    if above is None:
        yield path
        return
    copied, name = json.loads((above / COPIED).read_text()), path.relative_to(above).as_posix()
    address = join(copied["address"], name)
    with kept(above):
        try:
            place = stage(path, copied["files"].get(name), lambda to: _get(address, to), address)
        except FileNotFoundError:
            remedy, cache = "start again", copied["address"].rpartition("/")
            if (above / META).exists():
                remedy = f"mixtral-jax data cache rm {cache[2]} --cache-dir {cache[0]}, and prepare the data again"
            raise OSError(errno.ESTALE, f"is there no more, though it was: {remedy}", address) from None
        yield place


def _get(address: str, to: str) -> None:
    fs, name = file_system(address)
    fs.get_file(name, to)


def put(path: Path, address: str) -> None:
    """Uploads a file.

    Raises:
        OSError: it cannot be written there.
    """

    def write(fs: Any, name: str) -> None:
        with contextlib.suppress(RuntimeError, FileExistsError):  # object stores have no directories
            fs.makedirs(name.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(path), name)
        if (size := fs.info(name)["size"]) not in (None, path.stat().st_size):
            raise OSError(f"{size:,} of {path.stat().st_size:,} bytes arrived")

    if address.startswith("http"):
        raise ValueError(f"{address} cannot be written: web servers are only read from")
    _ask(address, write)


def read_small(address: str) -> bytes | None:
    """What a small file elsewhere holds; None: it is not there."""
    try:
        return _ask(address, lambda fs, name: fs.cat_file(name))
    except FileNotFoundError:
        return None


def file_system(address: str) -> tuple[Any, str]:
    """What reads an address, and the name that it has there.

    Raises:
        ValueError: no library that is installed reads addresses of this kind.
        OSError: the other side does not answer.
    """
    try:
        return patiently(address, lambda: fsspec.core.url_to_fs(address))
    except Exception as error:  # each scheme has kinds of its own: no library for it, no archive
        if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
            raise
        raise ValueError(f"{address} cannot be read: {str(error) or type(error).__name__}") from None


def _ask(address: str, question: Callable[[Any, str], T]) -> T:
    """What a file system says of an address, asked again where it does not answer."""
    fs, name = file_system(address)
    return patiently(address, lambda: question(fs, name))


def _info(address: str) -> dict[str, Any]:
    """What a file system knows of an address; nothing: there is nothing. `fs.exists` takes a failure for that, too.

    While data is prepared each address is asked once, until `ask_anew`.
    """
    key = os.environ.get(START, ""), address
    try:
        known = _known.get(key) or _ask(address, lambda fs, name: fs.info(name))
    except FileNotFoundError:
        return {}
    if key[0]:
        _known[key] = known
    return known


def ask_anew() -> None:
    """Forgets what was known of addresses."""
    _known.clear()


def file_size(path: str) -> int:
    """Bytes of a file as it is stored; of one elsewhere whose server does not say, those of its copy."""
    size: int | None = file_identity(path)[0]
    if size is None:
        with local_copy(path) as copy:
            return os.path.getsize(copy)
    return size


def file_identity(path: str) -> list[Any]:
    """Its size (None: a server that does not say), and what changes when its content may have changed."""
    if not is_remote(path):
        found = os.stat(path)
        return [found.st_size, os.path.abspath(path), found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    known = _info(path)
    if not known:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return [known.get("size"), path, str(known)]


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
    return not path.startswith("http") and _info(path).get("type") == "directory"


def exists(path: str) -> bool:
    """Whether there is something; a link to nothing is."""
    if not is_remote(path):
        return os.path.lexists(path)
    return bool(_info(path))


def join(directory: str, name: str) -> str:
    """The path of a name below a directory; of `zip://a::b.zip` the first part grows."""
    first, *others = directory.split("::")
    between = "" if not first or first.endswith("/") else "/"
    return "::".join([f"{first}{between}{name}" if name else first, *others])


def files_below(directory: str) -> list[str]:
    """Relative names of all files below a directory, sorted. Links are followed; what is hidden is passed over."""
    if is_remote(directory):
        return _visible(_below(directory))
    been, found = {os.path.realpath(directory)}, []
    for above, folders, names in os.walk(directory, followlinks=True):
        places = {os.path.realpath(os.path.join(above, folder)): folder for folder in sorted(folders, reverse=True)}
        folders[:] = [folder for place, folder in places.items() if place not in been]
        been.update(places)
        found += [os.path.relpath(os.path.join(above, name), directory) for name in names]
    return _visible(found)


def sizes_below(address: str) -> dict[str, int]:
    """Relative name -> bytes of all files below an address."""
    return {name: known["size"] or 0 for name, known in _below(address).items()}


def _below(address: str) -> dict[str, dict[str, Any]]:
    """Relative name -> what the file system knows of each file below an address."""

    def look(fs: Any, root: str) -> dict[str, dict[str, Any]]:
        return {name.removeprefix(root).strip("/"): known for name, known in fs.find(root, detail=True).items()}

    return _ask(address, look)


def remove_below(address: str) -> None:
    """Removes all files of an entry of a cache, META before the others."""
    for name in sorted(sizes_below(address), key=lambda name: name != META):
        _ask(join(address, name), lambda fs, path: fs.rm_file(path))


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

    def match(fs: Any, root: str) -> list[str]:
        return [n.removeprefix(root).strip("/") for n in fs.glob(f"{root}/{pattern}".lstrip("/" * (not root)))]

    return sorted(_ask(directory, match))


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not any(part.startswith((".", "__")) for part in name.split("/")))
