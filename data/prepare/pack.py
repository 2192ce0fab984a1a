"""Pass two: the buckets of a document store into shards of rows, in the order that the seed gives."""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixtral_jax.data.prepare import documents
from mixtral_jax.data.prepare.cache import SIZES, PreparedSource, forget, settle
from mixtral_jax.data.prepare.recipe import Recipe
from mixtral_jax.data.prepare.tokenise import no_documents
from mixtral_jax.data.prepare.workers import Workers
from mixtral_jax.data.progress import meter
from mixtral_jax.data.records import clear_scratch, scratch
from mixtral_jax.data.rows import PACKINGS, WRITER_OPTIONS, Pieces, hash64, pair_pieces
from mixtral_jax.data.text import Documents, cut_examples, join


@dataclass(frozen=True)
class _Job:
    recipe: Recipe  # of the short corpus
    bucket: int
    directory: Path


def pack(recipes: list[Recipe], pool: Workers, show: bool) -> None:
    """Packs each recipe of which there are no rows yet; the documents of all are there."""
    jobs: list[_Job] = []
    todo: dict[Path, tuple[Recipe, list[Counter[str]]]] = {}  # by where they are made
    for recipe in recipes:
        if recipe.load():
            continue
        clear_scratch(recipe.place)
        directory = scratch(recipe.place)
        directory.mkdir()
        todo[directory] = recipe, []
        short = replace(recipe, corpus=recipe.corpus.short)
        jobs += [_Job(short, bucket, directory) for bucket in range(recipe.corpus.buckets)]
    try:
        with meter("Packing", len(jobs), show=show and bool(jobs)) as advance:
            for job, counts in pool.ordered(pack_bucket, iter(jobs)):
                recipe, packed = todo[job.directory]
                packed.append(counts)
                advance(1, recipe.name)
                if len(packed) == recipe.corpus.buckets:
                    _finish(recipe, job.directory, packed)
    finally:
        for directory in todo:
            shutil.rmtree(directory, ignore_errors=True)


def pack_bucket(job: _Job) -> Counter[str]:
    """Packs one bucket into one shard, and counts what is in it; runs in a worker."""
    from array_record.python.array_record_module import ArrayRecordWriter

    recipe, corpus, row_format = job.recipe, job.recipe.corpus, job.recipe.format
    size, path = row_format.seq_len + 1, job.directory / recipe.shard(job.bucket)
    files = documents.bucket_files(corpus.place, job.bucket)
    numbers, found = documents.read_bucket(files, corpus.token_dtype, corpus.weighted)
    stored, lost = len(numbers), Counter[str]()
    found = found.pick(np.argsort(hash64(numbers, recipe.seed), kind="stable"))
    if corpus.weighted:
        found, lost = cut_examples(found, size, corpus.together)
    if row_format.pairs:
        pieces = pair_pieces(found.lengths, row_format.seq_len, row_format.pairs)
    else:
        pieces = PACKINGS[recipe.packing](found.lengths, row_format.seq_len)
    counts = Counter(stored=stored, documents=len(found.lengths), targets=found.targets, split=pieces.split) + lost
    counts["control_words"] = int(np.count_nonzero(found.control[:: corpus.together]))
    if pieces.rows:
        bounds = np.searchsorted(pieces.row, np.arange(pieces.rows + 1)).tolist()
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for row in range(pieces.rows):
            of_row = slice(bounds[row], bounds[row + 1])
            places = pieces.start[of_row], pieces.length[of_row]
            learned = None if found.learned is None else join(found.learned, *places)
            writer.write(row_format.encode(places[1], join(found.tokens, *places), learned))
        writer.close()
        path.with_suffix(".sizes").write_bytes(_sizes(pieces, found).tobytes())
        counts.update(rows=pieces.rows, bytes=path.stat().st_size, tokens=int(pieces.length.sum()))
    return counts


def _sizes(pieces: Pieces, found: Documents) -> np.ndarray:
    """(rows, 2) uint32: tokens, and bytes of text, of each row.

    A document that is cut gives each piece its bytes by its tokens, but for the one that joins it to the piece before;
    rounded by where a piece ends, so that they sum to all.
    """
    ends = np.cumsum(found.lengths)
    document = np.searchsorted(ends, pieces.start, side="right")
    begin = pieces.start - (ends - found.lengths)[document]
    length, text_bytes = found.lengths[document], found.text_bytes[document]
    before = text_bytes * (begin + (begin > 0)) // length
    own = text_bytes * (begin + pieces.length) // length - before
    columns = [np.bincount(pieces.row, column, pieces.rows) for column in (pieces.length, own)]
    return np.stack(columns, axis=1).astype(np.uint32)


def _finish(recipe: Recipe, directory: Path, packed: list[Counter[str]]) -> None:
    """Writes what was counted and gives the directory its final name; `packed` is of all buckets."""
    corpus, total = recipe.corpus, sum(packed, Counter[str]())
    census = corpus.load() or corpus.census()
    stored, expected = total.pop("stored", 0), census.counts.pop("stored", 0)
    if stored != expected:
        forget(corpus.place.parent, corpus.place.name)
        raise ValueError(
            f"{corpus.place} held {stored} of {expected} documents: it was damaged and is removed now, run again"
        )
    census.counts.update(total)
    if not total["documents"]:
        raise ValueError(no_documents(corpus, census))
    del census.counts["rows"], census.counts["bytes"]
    shards = tuple((recipe.shard(i), n["rows"], n["bytes"]) for i, n in enumerate(packed) if n["rows"])
    _join_sizes(directory, [name for name, _, _ in shards], total["rows"])
    prepared = PreparedSource(
        name=recipe.name,
        fingerprint=recipe.fingerprint,
        directory=str(recipe.place),
        format=recipe.format,
        shards=shards,
        bad=census.bad,
        bad_examples=tuple(census.bad_examples),
        layouts=dict(census.layouts),
        **census.counts,
    )
    about = {"seq_len": recipe.format.seq_len, "seed": recipe.seed, "packing": recipe.packing}
    prepared.save(directory, corpus.made_of | about)
    settle(directory, recipe.place)


def _join_sizes(directory: Path, shards: list[str], rows: int) -> None:
    """The sizes of all shards as one file; by plain writes, as to a map a full disk is a signal that kills."""
    about = {"descr": "<u4", "fortran_order": False, "shape": (rows, 2)}
    with open(directory / SIZES, "wb") as out:
        np.lib.format.write_array_header_1_0(out, about)
        for shard in shards:
            own = (directory / shard).with_suffix(".sizes")
            out.write(own.read_bytes())
            own.unlink()
