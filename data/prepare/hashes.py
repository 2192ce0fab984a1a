"""Hashes of the content of source files, which the cache remembers for all who share it."""

import concurrent.futures
import hashlib
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixtral_jax.data.prepare.cache import remember
from mixtral_jax.data.progress import meter, say
from mixtral_jax.data.records import data_files, digest, file_identity, file_size, open_file

_THREADS, _PIECE_BYTES, _QUIET_SECONDS = 8, 1 << 20, 2.0


def content_hash(path: str, cache_dir: Path) -> list[list[Any]]:
    """[relative name, bytes, sha256 of the content] of a file, or of each file of a data set directory.

    A hash is remembered in the cache and taken from there while size, modification and change time and inode of the
    file stay the same.
    """
    names = {file: "" if file == path else file.removeprefix(path).lstrip("/") for file in data_files(path)}
    return [[name, *_hash(file, cache_dir, [])] for file, name in names.items()]


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

    def count() -> str:
        counted = hashlib.sha256()
        with open_file(file) as stream:
            while piece := stream.read(_PIECE_BYTES):
                counted.update(piece)
                read.append(len(piece))
        return counted.hexdigest()

    known = remember(cache_dir, f"hashes/{digest(identity)}", count)
    return file_size(file) if identity[0] is None else identity[0], known
