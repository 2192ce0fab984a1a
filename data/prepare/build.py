"""The two passes of a preparation: lumps of records into buckets of documents, buckets into shards of rows."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.prepare import spill
from mixtral_jax.data.prepare.cache import PreparedSource, load_prepared, write_atomically
from mixtral_jax.data.prepare.workers import Workers, process_tokenizer
from mixtral_jax.data.progress import Meter
from mixtral_jax.data.records.lump import Lump, Problems
from mixtral_jax.data.records.sources import read_lumps
from mixtral_jax.data.rows.packing import PACKINGS, pair_pieces
from mixtral_jax.data.rows.pairs import pair_documents
from mixtral_jax.data.rows.row import WRITER_OPTIONS, RowFormat
from mixtral_jax.data.text.chat import TrainOn
from mixtral_jax.data.text.examples import ChatFormat, Documents, chat_documents, columns, text_documents
from mixtral_jax.data.text.template import load_template


@dataclass(frozen=True)
class Recipe:
    """One source and all that decides its rows."""

    source: SourceConfig
    files: tuple[str, ...]
    kind: str
    template: str | dict[str, Any]
    train_on: TrainOn
    packing: str
    seed: int
    buckets: int
    format: RowFormat
    tokenizer: str
    skip: bool
    fingerprint: str


@dataclass
class Counts:
    """What phase one counted."""

    documents: int = 0
    text_bytes: int = 0
    targets: int = 0
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    problems: Problems = field(default_factory=lambda: Problems(skip=True))

    def add(self, other: "Counts") -> None:
        """Adds the counts of another lump or part."""
        for name in ("documents", "text_bytes", "targets", "truncated", "dropped", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems.merge(other.problems)


def _parts(cache: Path, recipe: Recipe, count: int) -> Path:
    return cache / f"{recipe.fingerprint[:24]}.parts-of-{count}"


# --- phase one: lumps -> buckets ---


@dataclass(frozen=True)
class _TokeniseJob:
    recipe: Recipe
    lump: Lump
    number: int
    directory: Path


def tokenise(cache: Path, recipes: list[Recipe], index: int, count: int, pool: Workers, meter: Meter) -> None:
    """Makes part `index` of each recipe that lacks it."""
    totals: dict[str, Counts] = {}
    temporary: dict[str, Path] = {}
    for recipe in recipes:
        parts = _parts(cache, recipe, count)
        if (parts / f"part-{index}").exists() or load_prepared(cache, "", recipe.fingerprint):
            continue
        for dead in parts.glob(
            f"part-{index}.tmp-*"
        ):  # we hold the lock: whoever wrote it is gone, or its workers soon are
            shutil.rmtree(dead, ignore_errors=True)
        temporary[recipe.fingerprint] = parts / f"part-{index}.tmp-{os.getpid()}"
        temporary[recipe.fingerprint].mkdir(parents=True)
        totals[recipe.fingerprint] = Counts(problems=Problems(recipe.skip))
    active = [r for r in recipes if r.fingerprint in temporary]
    try:
        jobs = _jobs(active, temporary, index, count, totals)
        for job, counts in pool.ordered(tokenise_lump, jobs):
            total = totals[job.recipe.fingerprint]
            total.add(counts)
            meter.advance(job.lump.size, job.recipe.source.name)
        for recipe in active:
            directory = temporary[recipe.fingerprint]
            write_atomically(directory / "counts.json", json.dumps(asdict(totals[recipe.fingerprint])))
            os.rename(directory, directory.with_name(f"part-{index}"))
    finally:
        for directory in temporary.values():
            shutil.rmtree(directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: there are parts in it
                directory.parent.rmdir()


def _jobs(
    recipes: list[Recipe], directories: dict[str, Path], index: int, count: int, totals: dict[str, Counts]
) -> Iterator[_TokeniseJob]:
    for recipe in recipes:
        number = 0
        problems = totals[recipe.fingerprint].problems if index == 1 else Problems(recipe.skip)
        for file in recipe.files:
            for lump in read_lumps(recipe.source, file, columns(recipe.source, recipe.kind), problems):
                if number % count == index - 1:
                    yield _TokeniseJob(recipe, lump, number, directories[recipe.fingerprint])
                number += 1


def tokenise_lump(job: _TokeniseJob) -> Counts:
    """Tokenises one lump and spills its documents; runs in a worker."""
    recipe, tokenizer = job.recipe, process_tokenizer(job.recipe.tokenizer)
    problems = Problems(recipe.skip)
    if recipe.kind == "text":
        documents = text_documents(job.lump, recipe.source.text_key, tokenizer, problems)
    else:
        chat = ChatFormat(load_template(recipe.template, tokenizer), tokenizer, recipe.train_on)
        read = pair_documents if recipe.kind == "preference" else chat_documents
        documents = read(job.lump, recipe.source, chat, recipe.format.seq_len, problems)
    together = 2 if recipe.kind == "preference" else 1  # both sequences of a pair have its key, and so stay neighbours
    keys = spill.document_keys(job.number, len(documents.lengths) // together, recipe.seed).repeat(together)
    spill.append(job.directory, recipe.buckets, keys, documents.lengths, documents.tokens, documents.weights)
    return Counts(
        documents=len(documents.lengths),
        text_bytes=documents.text_bytes,
        targets=_targets(documents),
        truncated=documents.truncated,
        dropped=documents.dropped,
        empty=documents.empty,
        problems=problems,
    )


def _targets(documents: Documents) -> int:
    if documents.weights is None:
        return len(documents.tokens) - len(documents.lengths)
    return int(np.count_nonzero(documents.weights))


# --- phase two: buckets -> shards ---


@dataclass(frozen=True)
class _PackJob:
    recipe: Recipe
    bucket: int
    parts: tuple[Path, ...]
    path: Path


def pack(cache: Path, recipes: list[Recipe], count: int, pool: Workers, meter: Meter) -> list[str]:
    """Packs each recipe whose parts are all there; returns the names of parts that are not."""
    missing: list[str] = []
    jobs: list[_PackJob] = []
    packed: dict[str, list[Any]] = {}
    for recipe in recipes:
        if load_prepared(cache, "", recipe.fingerprint):
            continue
        parts = [_parts(cache, recipe, count) / f"part-{i}" for i in range(1, count + 1)]
        lacking = [f"{recipe.source.name}: {p.name} of {count}" for p in parts if not p.exists()]
        missing.extend(lacking)
        if lacking:
            continue
        for dead in cache.glob(f"{recipe.fingerprint[:24]}.*tmp-*"):  # we hold the lock
            shutil.rmtree(dead, ignore_errors=True)
        directory = cache / f"{recipe.fingerprint[:24]}.tmp-{os.getpid()}"
        directory.mkdir()
        packed[recipe.fingerprint] = []
        for bucket in range(recipe.buckets):
            name = f"rows-{bucket:05d}-of-{recipe.buckets:05d}.array_record"
            jobs.append(_PackJob(recipe, bucket, tuple(parts), directory / name))
    for job, result in pool.ordered(pack_bucket, iter(jobs)):
        packed[job.recipe.fingerprint].append(result)
        meter.advance(result.tokens * 4, job.recipe.source.name)
    for recipe in recipes:
        if recipe.fingerprint in packed:
            _finish(cache, recipe, count, packed[recipe.fingerprint])
    return missing


@dataclass(frozen=True)
class _Shard:
    name: str
    rows: int
    size: int
    documents: int
    tokens: int
    split: int


def pack_bucket(job: _PackJob) -> _Shard:
    """Packs one bucket into one shard; runs in a worker."""
    from array_record.python.array_record_module import ArrayRecordWriter

    layout = job.recipe.format
    directories = [part / f"{job.bucket:06d}" for part in job.parts]
    lengths, tokens, weights = spill.read_bucket(directories, layout.token_dtype, layout.weighted)
    if layout.pairs:
        pieces = pair_pieces(lengths, layout.seq_len, layout.pairs)
    else:
        pieces = PACKINGS[job.recipe.packing](lengths, layout.seq_len)
    if not pieces.rows:
        return _Shard(job.path.name, 0, 0, 0, 0, 0)
    bounds = np.searchsorted(pieces.row, np.arange(pieces.rows + 1)).tolist()
    writer = ArrayRecordWriter(str(job.path), WRITER_OPTIONS)
    for row in range(pieces.rows):
        of_row = slice(bounds[row], bounds[row + 1])
        starts, sizes = pieces.start[of_row], pieces.length[of_row]
        row_weights = None if weights is None else spill.gather(weights, starts, sizes)
        writer.write(layout.encode(sizes, spill.gather(tokens, starts, sizes), row_weights))
    writer.close()
    return _Shard(
        name=job.path.name,
        rows=pieces.rows,
        size=job.path.stat().st_size,
        documents=len(lengths),
        tokens=int(pieces.length.sum()),
        split=pieces.split,
    )


def _finish(cache: Path, recipe: Recipe, count: int, results: list[_Shard]) -> None:
    """Writes meta.json and gives the directory its final name."""
    parts = _parts(cache, recipe, count)
    counts = Counts()
    for i in range(1, count + 1):
        stored = json.loads((parts / f"part-{i}" / "counts.json").read_text())
        counts.add(Counts(**{**stored, "problems": Problems(**stored["problems"])}))
    directory, final = cache / f"{recipe.fingerprint[:24]}.tmp-{os.getpid()}", cache / recipe.fingerprint[:24]
    found = sum(r.documents for r in results)
    if found != counts.documents or not found:
        shutil.rmtree(directory)
        _remove(parts)
    if found != counts.documents:
        raise ValueError(
            f"{parts} held {found} of {counts.documents} documents: it was damaged and is removed now, run again"
        )
    if not found:
        raise ValueError(_no_documents(recipe, counts))
    prepared = PreparedSource(
        name=recipe.source.name,
        fingerprint=recipe.fingerprint,
        directory=str(final),
        format=recipe.format,
        shards=tuple((r.name, r.rows, r.size) for r in results if r.rows),
        documents=counts.documents,
        tokens=sum(r.tokens for r in results),
        targets=counts.targets,
        text_bytes=counts.text_bytes,
        split=sum(r.split for r in results),
        truncated=counts.truncated,
        dropped=counts.dropped,
        empty=counts.empty,
        bad=counts.problems.count,
        bad_examples=tuple(counts.problems.first),
    )
    write_atomically(directory / "meta.json", json.dumps(prepared.to_meta(), indent=1))
    if final.exists():  # a damaged one, else it would have been used
        shutil.rmtree(final)
    os.rename(directory, final)
    _remove(parts)


def _no_documents(recipe: Recipe, counts: Counts) -> str:
    seen = {"empty": counts.empty, "without an answer to learn": counts.dropped, "bad": counts.problems.count}
    found = ", ".join(f"{count} {what}" for what, count in seen.items() if count)
    files = ", ".join(recipe.files[:3]) + (" ..." if len(recipe.files) > 3 else "")
    first = "".join(f"; {message}" for message in counts.problems.first[:1])
    return f"source {recipe.source.name!r}: no documents to learn from in {files}, " + (
        f"which has {found} records{first}" if found else "which has no records"
    )


def _remove(parts: Path) -> None:
    """Removes all parts at once for whoever looks: a half-removed part must not pass for a whole one."""
    doomed = parts.with_name(f"{parts.name}.tmp-{os.getpid()}")
    os.rename(parts, doomed)
    shutil.rmtree(doomed)
