"""Hashes of the content of source files, which the cache remembers for all who share it."""

import concurrent.futures
import contextlib
import hashlib
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixtral_jax.data.prepare.cache import keep, recall
from mixtral_jax.data.progress import meter, say
from mixtral_jax.data.records import data_files, digest, file_identity, file_size, locked, open_file, stripe

_THREADS, _PIECE_BYTES, _QUIET_SECONDS = 8, 1 << 20, 2.0
_known_hashes: dict[tuple[Path, str], str] = {}  # of a cache and a file; for one that cannot be written


def content_hash(path: str, cache_dir: Path) -> list[list[Any]]:
    """[relative name, bytes, sha256 of the content] of a file, or of each file of a data set directory.

    A hash is remembered in the cache and taken from there while size, modification and change time and inode of the
    file stay the same.
    """
    result: list[list[Any]] = []
    for file in data_files(path):
        result.append(["" if file == path else file.removeprefix(path).lstrip("/"), *_hash(file, cache_dir, [])])
    return result


def hash_files(paths: Iterable[str], cache_dir: Path, show: bool = True) -> None:
    """Sees to it that the cache has the hashes of files: several are read at once, and none by two processes."""
    files = sorted({file for path in paths for file in data_files(path)})
    random.shuffle(files)  # machines that hash the same files at the same time each begin with others
    read: list[int] = []  # bytes
    pool = concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        jobs = [pool.submit(_hash, file, cache_dir, read) for file in files]
        waiting = concurrent.futures.wait(jobs, _QUIET_SECONDS, concurrent.futures.FIRST_EXCEPTION).not_done
        if waiting and show:
            total, shown = sum(map(file_size, files)), 0
            say(f"hashing {len(files):,} files, {total / 1e9:.1f} GB")
            with meter("Hashing", total) as advance:
                while waiting and not any(job.done() and job.exception() for job in jobs):
                    waiting = concurrent.futures.wait(waiting, 0.2).not_done
                    advance(sum(read) - shown, "")
                    shown = sum(read)
        for _, job in sorted(zip(files, jobs, strict=True), key=lambda pair: pair[0]):
            job.result()  # of several errors the first
    finally:
        pool.shutdown(cancel_futures=True)


def _hash(file: str, cache_dir: Path, read: list[int]) -> tuple[int, str]:
    """(bytes, sha256) of a file; each piece that is read now is noted in `read`."""
    identity = file_identity(file)
    key = digest(identity)
    memo = f"hashes/{key}"
    with contextlib.ExitStack() as held:
        if not (known := _known_hash(cache_dir, memo)):
            with contextlib.suppress(OSError):  # a cache that may only be read
                held.enter_context(locked(stripe(cache_dir, key)))
            known = _known_hash(cache_dir, memo)
        if not known:
            counted = hashlib.sha256()
            with open_file(file) as stream:
                while piece := stream.read(_PIECE_BYTES):
                    counted.update(piece)
                    read.append(len(piece))
            known = counted.hexdigest()
            with contextlib.suppress(OSError, ValueError):  # the next one hashes it again
                keep(cache_dir, memo, known.encode())
        _known_hashes[cache_dir, memo] = known
    return file_size(file) if identity[0] is None else identity[0], known


def _known_hash(cache_dir: Path, memo: str) -> str:
    found = _known_hashes.get((cache_dir, memo)) or (recall(cache_dir, memo) or b"").decode()
    return found if len(found) == 64 else ""
