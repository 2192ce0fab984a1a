"""The two passes of a preparation: lumps of records into buckets of documents, buckets into shards of rows."""

import contextlib
import functools
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import spill
from mixtral_jax.data.prepare.cache import PreparedSource, load_prepared, write_atomically
from mixtral_jax.data.prepare.workers import Workers
from mixtral_jax.data.records import Census, Lump, read_lumps
from mixtral_jax.data.rows import PACKINGS, WRITER_OPTIONS, RowFormat, pair_pieces
from mixtral_jax.data.text import columns, layouts_of, load_template, load_tokenizer, text_documents, tuning_documents

_FIRST_ROWS = 100  # of a file, which show its layout
Advance = Callable[[int, str], None]  # of a progress bar
process_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)  # of this process, loaded once


@dataclass(frozen=True)
class Recipe:
    """One source, all that decides its rows, and where they are made."""

    config: DataConfig
    source: SourceConfig
    files: tuple[str, ...]
    described: str
    packing: str
    seed: int
    buckets: int
    format: RowFormat
    fingerprint: str

    @property
    def place(self) -> Path:
        """The directory of the rows; what is not finished lies beside it."""
        return Path(self.config.cache_dir) / self.fingerprint[:24]

    def parts(self, count: int) -> list[Path]:
        """Directories of the documents, as each of `count` machines tokenises them."""
        return [self.place.with_name(f"{self.place.name}.parts-of-{count}") / f"part-{i + 1}" for i in range(count)]

    def shard(self, bucket: int) -> str:
        """Name of the file of the rows of a bucket."""
        return f"rows-{bucket:05d}-of-{self.buckets:05d}.array_record"

    def load(self) -> PreparedSource | None:
        """The prepared source, where it is there."""
        return load_prepared(self.place.parent, self.source.name, self.fingerprint)

    def census(self) -> Census:
        """Nothing counted yet."""
        return Census(skip=self.config.on_error == "skip")


# --- phase one: lumps -> buckets ---


@dataclass(frozen=True)
class _Part:
    """This machine's share of a source, while it is tokenised."""

    recipe: Recipe
    directory: Path
    census: Census


@dataclass(frozen=True)
class _TokeniseJob:
    part: _Part
    lump: Lump
    number: int
    layouts: tuple[str, ...]  # of the file's first rows


def tokenise(recipes: list[Recipe], index: int, count: int, pool: Workers, advance: Advance) -> None:
    """Makes part `index` of each recipe that lacks it."""
    parts: list[_Part] = []
    for recipe in recipes:
        final = recipe.parts(count)[index - 1]
        if final.exists() or recipe.load():
            continue
        for dead in final.parent.glob(f"{final.name}.tmp-*"):
            # we hold the lock: whoever wrote it is gone, or its workers soon are
            shutil.rmtree(dead, ignore_errors=True)
        parts.append(_Part(recipe, final.with_name(f"{final.name}.tmp-{os.getpid()}"), recipe.census()))
        parts[-1].directory.mkdir(parents=True)
    try:
        for job, census in pool.ordered(tokenise_lump, _jobs(parts, index, count)):
            job.part.census.add(census)
            advance(job.lump.size, job.part.recipe.source.name)
        for part in parts:
            _write_counts(part.directory, part.census)
            os.rename(part.directory, part.directory.with_suffix(""))
    finally:
        for part in parts:
            shutil.rmtree(part.directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: there are parts in it
                part.directory.parent.rmdir()


def _jobs(parts: list[_Part], index: int, count: int) -> Iterator[_TokeniseJob]:
    for part in parts:
        recipe = part.recipe
        census = part.census if index == 1 else recipe.census()  # every machine reads all; one counts what is bad
        for number, (lump, layouts) in enumerate(_lumps(recipe, census)):
            if number % count == index - 1:
                yield _TokeniseJob(part, lump, number, layouts)


def _lumps(recipe: Recipe, census: Census) -> Iterator[tuple[Lump, tuple[str, ...]]]:
    """All lumps of a source, each with the layouts of the first rows of its file."""
    source, kind = recipe.source, recipe.config.examples
    for file in recipe.files:
        layouts: tuple[str, ...] | None = () if kind == "text" else None
        for lump in read_lumps(source, file, columns(source, kind), census):
            if layouts is None:
                first = itertools.islice(lump.parse(Census(skip=True)), _FIRST_ROWS)
                try:
                    layouts = layouts_of((record for _, record in first), source, kind)
                except ValueError as error:
                    raise ValueError(f"{file}: {error}") from None
            yield lump, layouts


def tokenise_lump(job: _TokeniseJob) -> Census:
    """Tokenises one lump and spills its documents; runs in a worker."""
    recipe, config, source = job.part.recipe, job.part.recipe.config, job.part.recipe.source
    tokenizer, census = process_tokenizer(config.tokenizer), recipe.census()
    if config.examples == "text":
        documents = text_documents(job.lump, source.text_key, tokenizer, census)
    else:
        template, size = load_template(config.template, tokenizer), recipe.format.seq_len + 1
        documents = tuning_documents(
            job.lump, source, config.examples, template, config.train_on, size, census, job.layouts
        )
    together = 2 if recipe.format.pairs else 1  # both sequences of a pair have its key, and so stay neighbours
    keys = spill.document_keys(job.number, len(documents.lengths) // together, recipe.seed).repeat(together)
    spill.append(job.part.directory, recipe.buckets, keys, documents)
    census.counts.update(documents=len(documents.lengths), targets=documents.targets)
    return census


def _write_counts(directory: Path, census: Census) -> None:
    problems = {"count": census.bad, "first": census.bad_examples}
    counts = {**census.counts, "layouts": census.layouts, "problems": problems}
    write_atomically(directory / "counts.json", json.dumps(counts))


def _read_counts(directory: Path) -> Census:
    counts = json.loads((directory / "counts.json").read_text())
    problems, layouts = counts.pop("problems"), Counter(counts.pop("layouts"))
    return Census(True, problems["count"], problems["first"], Counter(counts), layouts)


# --- phase two: buckets -> shards ---


@dataclass(frozen=True)
class _PackJob:
    recipe: Recipe
    bucket: int
    parts: list[Path]
    directory: Path


def pack(recipes: list[Recipe], count: int, pool: Workers, advance: Advance) -> list[str]:
    """Packs each recipe whose parts are all there; returns the names of parts that are not."""
    missing: list[str] = []
    jobs: list[_PackJob] = []
    for recipe in recipes:
        if recipe.load():
            continue
        parts = recipe.parts(count)
        lacking = [f"{recipe.source.name}: {part.name} of {count}" for part in parts if not part.exists()]
        missing.extend(lacking)
        if lacking:
            continue
        for dead in recipe.place.parent.glob(f"{recipe.place.name}.*tmp-*"):  # we hold the lock
            shutil.rmtree(dead, ignore_errors=True)
        directory = recipe.place.with_name(f"{recipe.place.name}.tmp-{os.getpid()}")
        directory.mkdir()
        jobs.extend(_PackJob(recipe, bucket, parts, directory) for bucket in range(recipe.buckets))
    packed: list[Counter[str]] = []
    for job, counts in pool.ordered(pack_bucket, iter(jobs)):
        packed.append(counts)
        advance(counts["tokens"] * 4, job.recipe.source.name)
        if len(packed) == job.recipe.buckets:  # results come in the order of the jobs
            _finish(job, packed)
            packed = []
    return missing


def pack_bucket(job: _PackJob) -> Counter[str]:
    """Packs one bucket into one shard, and counts what is in it; runs in a worker."""
    from array_record.python.array_record_module import ArrayRecordWriter

    recipe, row_format = job.recipe, job.recipe.format
    path = job.directory / recipe.shard(job.bucket)
    directories = [part / f"{job.bucket:06d}" for part in job.parts]
    documents = spill.read_bucket(directories, row_format.token_dtype, row_format.weighted)
    if row_format.pairs:
        pieces = pair_pieces(documents.lengths, row_format.seq_len, row_format.pairs)
    else:
        pieces = PACKINGS[recipe.packing](documents.lengths, row_format.seq_len)
    if not pieces.rows:
        return Counter()
    bounds = np.searchsorted(pieces.row, np.arange(pieces.rows + 1)).tolist()
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for row in range(pieces.rows):
        of_row = slice(bounds[row], bounds[row + 1])
        writer.write(row_format.encode(*documents.slices(pieces.start[of_row], pieces.length[of_row])))
    writer.close()
    return Counter(
        rows=pieces.rows,
        bytes=path.stat().st_size,
        documents=len(documents.lengths),
        tokens=int(pieces.length.sum()),
        split=pieces.split,
    )


def _finish(job: _PackJob, packed: list[Counter[str]]) -> None:
    """Writes meta.json and gives the directory of a recipe its final name; `packed` is of all buckets."""
    recipe, parts = job.recipe, job.parts[0].parent
    census, total = recipe.census(), sum(packed, Counter[str]())
    for part in job.parts:
        census.add(_read_counts(part))
    found, expected = total["documents"], census.counts["documents"]
    if found != expected or not found:
        shutil.rmtree(job.directory)
        _remove(parts)
    if found != expected:
        raise ValueError(f"{parts} held {found} of {expected} documents: it was damaged and is removed now, run again")
    if not found:
        raise ValueError(_no_documents(recipe, census))
    prepared = PreparedSource(
        name=recipe.source.name,
        fingerprint=recipe.fingerprint,
        directory=str(recipe.place),
        format=recipe.format,
        shards=tuple((recipe.shard(i), n["rows"], n["bytes"]) for i, n in enumerate(packed) if n["rows"]),
        tokens=total["tokens"],
        split=total["split"],
        bad=census.bad,
        bad_examples=tuple(census.bad_examples),
        layouts=dict(census.layouts),
        **census.counts,
    )
    prepared.save(job.directory)
    if recipe.load():  # made meanwhile on a machine that does not see our locks, and perhaps in use
        shutil.rmtree(job.directory)
    else:
        shutil.rmtree(recipe.place, ignore_errors=True)  # a damaged one
        os.rename(job.directory, recipe.place)
    _remove(parts)


def _no_documents(recipe: Recipe, census: Census) -> str:
    counts = census.counts
    seen = {"empty": counts["empty"], "without an answer to learn": counts["dropped"], "bad": census.bad}
    found = ", ".join(f"{count} {what}" for what, count in seen.items() if count)
    files = ", ".join(recipe.files[:3]) + (" ..." if len(recipe.files) > 3 else "")
    first = "".join(f"; {message}" for message in census.bad_examples[:1])
    return f"source {recipe.source.name!r}: no documents to learn from in {files}, " + (
        f"which has {found} records{first}" if found else "which has no records"
    )


def _remove(parts: Path) -> None:
    """Removes all parts at once for whoever looks: a half-removed part must not pass for a whole one."""
    doomed = parts.with_name(f"{parts.name}.tmp-{os.getpid()}")
    os.rename(parts, doomed)
    shutil.rmtree(doomed)
