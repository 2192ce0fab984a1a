"""Directories of files, local or remote (fsspec), read by position and never mapped into memory."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec

_POINTER = b"version https://git-lfs.github.com/spec/"
PathLike = str | os.PathLike[str]
SMALL_FILES = {
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3", "tekken.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
}  # fmt: skip


class File:
    """A file to read by position, from any thread. A memory map would count as resident memory; this does not."""

    def __init__(self, path: str, remote: Any = None) -> None:
        self.path, self._remote = path, remote
        if remote is None:
            if not os.path.isfile(path) and os.path.lexists(path):  # to open a pipe is to wait for ever
                what = "a link to nothing" if os.path.islink(path) else "no regular file (a pipe, a device?)"
                raise ValueError(f"{path} is {what}")
            self._descriptor = os.open(path, os.O_RDONLY)
        self.size: int = os.fstat(self._descriptor).st_size if remote is None else remote.size(path)
        if self.size < 1024 and bytes(self.pread(0, min(self.size, len(_POINTER)))) == _POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull in its directory")

    def pread(self, offset: int, size: int) -> bytearray | bytes:
        """Exactly `size` bytes."""
        if self._remote is not None:
            data = self._remote.cat_file(self.path, start=offset, end=offset + size)
            done = len(data)
        else:
            data, done = bytearray(size), 0
            while done < size and (
                n := os.preadv(self._descriptor, [memoryview(data)[done:][: 1 << 30]], offset + done)
            ):
                done += n
        if done != size:
            raise ValueError(f"{self.path} ends early: {size:,} bytes at {offset:,} were expected, {done:,} came")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Directory:
    """A directory by path or URL. Only plain files directly inside it are seen."""

    def __init__(self, path: PathLike) -> None:
        """Raises ValueError: nothing here reads such a URL."""
        self.url = os.fspath(path)
        self.remote = is_remote(self.url)
        if self.remote:
            try:
                self._fs, self._root = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise ValueError(f"{self.url} cannot be read: {error}") from error
        else:
            self._fs, self._root = None, self.url.removeprefix("file://")

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
        """Names of what is inside and no directory, sorted; empty where there is no such directory."""
        if not self.remote:  # links count as what they lead to: a snapshot of the hub's cache holds nothing else
            return sorted(e.name for e in os.scandir(self._root) if not e.is_dir()) if os.path.isdir(self._root) else []
        if not self._fs.isdir(self._root):
            return []
        found = self._fs.ls(self._root, detail=True)
        return sorted(f["name"].rstrip("/").rsplit("/", 1)[-1] for f in found if f["type"] == "file")

    def path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def file(self, name: str) -> File:
        return File(self.path(name), self._fs)

    def read_bytes(self, name: str) -> bytes:
        file = self.file(name)
        return bytes(file.pread(0, file.size)) if file.size else b""

    def read_json(self, name: str, what: str) -> dict[str, Any]:
        """The object in a JSON file; without the file the directory is not `what` it should be.

        Raises:
            FileNotFoundError: there is no such directory.
            ValueError: there is no such file, or it is no JSON object.
        """
        names = self.names()
        if not names and not self.exists():
            raise FileNotFoundError(f"{self} does not exist")
        if name not in names:
            raise ValueError(f"{self} has no {name}: it is no {what}")
        raw = self.read_bytes(name)
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self}/{name} is no JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self}/{name} holds no JSON object")
        return content

    def create(self, name: str) -> Any:
        """A new binary file, to be written front to back (on this machine anywhere) and closed."""
        return self._fs.open(self.path(name), "wb") if self.remote else open(self.path(name), "wb")

    def write_bytes(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write_bytes(name, (json.dumps(content, indent=2) + "\n").encode())


def read_small_files(directory: Directory) -> dict[str, bytes]:
    """What lies beside weights; a SentencePiece model of another name comes as tokenizer.model, where none has it."""
    names = directory.names()
    found = {name: directory.read_bytes(name) for name in sorted(SMALL_FILES.intersection(names))}
    models = [name for name in names if ".model" in name and not name.startswith(".")]
    if models and "tokenizer.model" not in found:
        found["tokenizer.model"] = directory.read_bytes(models[0])
    return found


def is_remote(path: PathLike) -> bool:
    """Whether a path is a URL of another kind than file://."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")
