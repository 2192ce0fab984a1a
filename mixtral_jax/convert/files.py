"""Directories of files, local or remote (fsspec), read by position and never mapped into memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec


class Reader(Protocol):
    """An open file: `pread(offset, size)` gives exactly `size` bytes and may be called from several threads."""

    size: int

    def pread(self, offset: int, size: int) -> bytearray | bytes: ...


class LocalReader:
    """A file on this machine. A memory map would count as resident memory; positioned reads do not."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size

    def pread(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        while done < size:
            n = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            if n == 0:
                raise ValueError(f"{self.path} ends at byte {offset + done:,}: {size - done:,} more were expected")
            done += n
        return buffer

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class RemoteReader:
    """A file behind fsspec, read by byte ranges."""

    def __init__(self, fs: Any, path: str) -> None:
        self.path, self._fs = path, fs
        self.size = fs.size(path)

    def pread(self, offset: int, size: int) -> bytes:
        data = self._fs.cat_file(self.path, start=offset, end=offset + size)
        if len(data) != size:
            raise ValueError(f"{self.path} ends early: {size:,} bytes at {offset:,} were expected, {len(data):,} came")
        return data


class Directory:
    """A directory by path or URL. Only plain files directly inside it are seen."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.url = os.fspath(path)
        self.remote = is_remote(self.url)
        self._fs: Any = None
        if self.remote:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        else:
            self._root = self.url.removeprefix("file://")

    def __str__(self) -> str:
        return self.url

    @property
    def local(self) -> Path:
        """The path on this machine.

        Raises:
            ValueError: the directory is remote.
        """
        if self.remote:
            raise ValueError(f"{self.url} is not on this machine: this step needs a local directory")
        return Path(self._root)

    def exists(self) -> bool:
        return self._fs.exists(self._root) if self.remote else os.path.lexists(self._root)

    def names(self) -> list[str]:
        """Names of the files inside, sorted; empty where there is no such directory."""
        if not self.remote:
            if not os.path.isdir(self._root):
                return []
            return sorted(e.name for e in os.scandir(self._root) if e.is_file())
        if not self._fs.isdir(self._root):
            return []
        found = self._fs.ls(self._root, detail=True)
        return sorted(f["name"].rstrip("/").rsplit("/", 1)[-1] for f in found if f["type"] == "file")

    def path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def reader(self, name: str) -> LocalReader | RemoteReader:
        return RemoteReader(self._fs, self.path(name)) if self.remote else LocalReader(self.path(name))

    def read_bytes(self, name: str) -> bytes:
        reader = self.reader(name)
        return bytes(reader.pread(0, reader.size)) if reader.size else b""

    @contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """A new file, written front to back; on this machine it is on disk (fsync) when the block ends."""
        if self.remote:
            with self._fs.open(self.path(name), "wb") as file:
                yield file
            return
        with open(self.path(name), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write_bytes(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of another kind than file://."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")
