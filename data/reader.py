"""Rows on disk, read at random: through a pool of open shards that is bounded, however many shards there are."""

import bisect
import errno
import itertools
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mixtral_jax.data.prepare import PreparedSource, Use, address_of
from mixtral_jax.data.records import fetched
from mixtral_jax.data.rows import Batch, PairBatch

_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}  # for single rows
_MOST = 1024  # open shards: each is a descriptor, and some bytes of memory for each of its rows
_STAMP_READS = 1000  # between two looks at the clock

References = Mapping[str, np.ndarray]  # fingerprint of a source -> (rows, K, 2) log-probabilities of the reference


class _Shard:
    """A file of rows; whoever is first to read from it opens it."""

    def __init__(self) -> None:
        self.opening, self.users = threading.Lock(), 0
        self.reader: Any = None

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


class ShardPool:
    """Open shards by path. Beyond `_bound()` those used longest ago are closed, none while it is read.

    Threads may read from one pool, and from one shard, at the same time. The threads that decompress are one small
    pool of the library's for the whole process.
    """

    def __init__(self) -> None:
        self._lock, self._shards = threading.Lock(), OrderedDict[str, _Shard]()

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, path: str, row: int) -> bytes:
        """One record of a shard.

        Raises:
            OSError: the shard is damaged, gone, or cannot be fetched.
        """
        shard = self._hold(path)
        try:
            if shard.reader is None:
                with shard.opening:
                    shard.reader = shard.reader or _open(path)
            return shard.reader.read([row])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            raise _damaged(path, error) from None
        finally:
            with self._lock:
                shard.users -= 1

    def close(self, paths: Sequence[str]) -> None:
        """Closes those of the shards that are open and not read at this moment."""
        with self._lock:
            idle = [self._shards.pop(p) for p in paths if p in self._shards and not self._shards[p].users]
        for shard in idle:
            shard.close()

    def _hold(self, path: str) -> _Shard:
        """A shard that is not closed as long as it has users; for a new one others may go."""
        idle: list[_Shard] = []
        with self._lock:
            shard = self._shards.get(path)
            if shard is None:
                shard = self._shards[path] = _Shard()
                surplus = len(self._shards) - _bound()
                doomed = itertools.islice((p for p, other in self._shards.items() if not other.users), max(0, surplus))
                idle = [self._shards.pop(p) for p in list(doomed) if p != path]
            else:
                self._shards.move_to_end(path)
            shard.users += 1
        for other in idle:
            other.close()
        return shard


def _bound() -> int:
    """A quarter of the files that this process may have open now."""
    return max(1, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


def _open(path: str) -> Any:
    with fetched(Path(path)) as place:
        reader = ArrayRecordReader(str(place), **_OPTIONS)
    if reader.ok():
        return reader
    try:
        reader.close()  # says what it was
    except RuntimeError as error:
        raise _damaged(path, error) from None
    raise _damaged(path, "it cannot be opened")


def _damaged(path: str, why: object) -> OSError:
    entry = Path(path).parent
    cache = address_of(entry.parent) or entry.parent
    remedy = f"mixtral-jax data cache rm {entry.name} --cache-dir {cache}, and prepare the data again"
    first = str(why).partition("\n")[0]
    return OSError(errno.EIO, f"is damaged, or there no more ({first}): {remedy}", path)


_pool = ShardPool()


class RowReader:
    """Random access to the rows of prepared sources; pairs with their reference log-probabilities where known.

    While it is open nobody removes the sources from the cache.
    """

    def __init__(self, sources: Sequence[PreparedSource], references: References | None = None):
        self._sources, self._references = sources, references or {}
        self._paths = [source.paths for source in sources]
        self._ends = [list(itertools.accumulate(rows for _, rows, _ in source.shards)) for source in sources]
        self._uses = [Use(Path(s.directory).parent, Path(s.directory).name) for s in sources]
        self._reads = 0
        self.close = weakref.finalize(self, _release, self._paths, self._uses)  # closes the files

    def read(self, source: int, row: int) -> Batch | PairBatch:
        """One row."""
        ends = self._ends[source]
        shard = bisect.bisect_right(ends, row)
        self._reads += 1
        if self._reads % _STAMP_READS == 0:
            self._uses[source].stamp()
        record = _pool.read(self._paths[source][shard], row - (ends[shard - 1] if shard else 0))
        found = self._sources[source].format.decode(record)
        known = self._references.get(self._sources[source].fingerprint)
        if known is None or isinstance(found, Batch):
            return found
        return found._replace(ref_logps=known[row])


def _release(paths: Sequence[Sequence[str]], uses: Sequence[Use]) -> None:
    for of_source, use in zip(paths, uses, strict=True):
        _pool.close(of_source)
        use.end()
