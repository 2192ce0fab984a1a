"""What makes two preparations the same, and how only one process makes them.

A prepared source lives in `<cache_dir>/<fingerprint>/`: shards of rows and `meta.json`. It is written elsewhere and
renamed when whole, so a directory of that name is complete or does not exist. The fingerprint covers the content of
the input files (not their names or dates), the tokenizer, the way from record to row, the seed and the format version.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.data.config import FrozenConfig
from mixtral_jax.data.records import data_files, file_identity, open_file
from mixtral_jax.data.rows import RowFormat

FORMAT_VERSION = 2
_SIZES = "sizes.npy"


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
        found: np.ndarray = np.load(os.path.join(self.directory, _SIZES), mmap_mode="r")
        return found

    def save(self, directory: Path) -> None:
        """Writes meta.json: all but the name, the place and the files."""
        meta = {"version": FORMAT_VERSION, **self.model_dump(exclude={"name", "directory", "described"})}
        write_atomically(directory / "meta.json", json.dumps(meta, indent=1))


def digest(value: Any) -> str:
    """Hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load_prepared(cache_dir: Path, name: str, fingerprint: str) -> PreparedSource | None:
    """The prepared source, or None where there is none or a shard is missing or has another size than it had."""
    directory = cache_dir / fingerprint[:24]
    try:
        meta = json.loads((directory / "meta.json").read_text())
        if meta.pop("version") != FORMAT_VERSION or meta["fingerprint"] != fingerprint:
            return None
        prepared = PreparedSource(name=name, directory=str(directory), **meta)
        whole = all(os.path.getsize(directory / n) == size for n, _, size in prepared.shards)
        whole = whole and prepared.sizes().shape == (prepared.rows, 2)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return prepared if whole else None


def content_hash(path: str, cache_dir: Path) -> list[list[Any]]:
    """[relative name, bytes, sha256 of the content] of a file, or of each file of a data set directory.

    A hash is remembered in the cache directory and taken from there while size, modification and change time and
    inode of the file stay the same.
    """
    result: list[list[Any]] = []
    for file in data_files(path):
        identity = file_identity(file)
        memo = cache_dir / "hashes" / digest(identity)
        try:
            known = memo.read_text()
        except OSError:
            known = ""
        if len(known) != 64:
            with open_file(file) as stream:
                known = hashlib.file_digest(stream, "sha256").hexdigest()
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memo, known)
        name = "" if file == path else os.path.relpath(file, path)
        result.append([name, identity[0], known])
    return result


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a small file so that a reader sees all of it or none."""
    temporary = path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")  # containers number their processes alike
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


@contextlib.contextmanager
def locked(path: Path, waiting: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock file; the system drops the lock when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
