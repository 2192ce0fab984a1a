"""Pass one: the units of a source into its document store, each machine its share."""

import contextlib
import functools
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixtral_jax.data.prepare import documents
from mixtral_jax.data.prepare.cache import forget, pull, seal, settle
from mixtral_jax.data.prepare.glance import documents_of, layouts_in, nothing_in
from mixtral_jax.data.prepare.recipe import Corpus, counts_of
from mixtral_jax.data.prepare.workers import Workers
from mixtral_jax.data.progress import meter
from mixtral_jax.data.records import Census, Lump, Unit, ask_anew, clear_scratch, read_lumps, scratch
from mixtral_jax.data.text import Documents, Tokenizer, columns, load_template, load_tokenizer

_HELD_TOKENS = 4 << 20  # until they are written: few blocks, bounded memory


@functools.lru_cache(maxsize=2)
def process_tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """A tokenizer of this process, loaded once; ValueError where it is not the one of the `fingerprint`."""
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint() != fingerprint:
        raise ValueError(f"tokenizer {path} was changed while data was prepared with it: prepare the data again")
    return tokenizer


@dataclass(frozen=True)
class _Job:
    corpus: Corpus  # the short one
    directory: Path
    unit: Unit
    number: int


def tokenise(corpora: list[Corpus], index: int, count: int, pool: Workers, show: bool) -> None:
    """Makes part `index` of each corpus that lacks it."""
    parts: dict[Path, tuple[Corpus, Census]] = {}  # by where they are made
    jobs: list[_Job] = []
    for corpus in corpora:
        final = corpus.parts(count)[index - 1]
        # who made this part may have joined it between the first two looks
        if corpus.load() or corpus.load_part(final, count) or corpus.load():
            continue
        beside = corpus.place.with_name(f"{corpus.place.name}.part-{index}-of-{count}")
        clear_scratch(beside)
        directory = scratch(beside)  # not among the parts: who is the last renames them all
        parts[directory] = corpus, corpus.census()
        units, short = enumerate(corpus.units), corpus.short
        jobs += [_Job(short, directory, unit, number) for number, unit in units if number % count == index - 1]
    try:
        for directory in parts:
            directory.mkdir(parents=True)
        with meter("Tokenising", sum(job.unit.size for job in jobs), show=show and bool(parts)) as advance:
            done = pool.ordered(tokenise_unit, iter(jobs), lambda job, size: advance(size, job.corpus.name))
            for job, census in done:
                parts[job.directory][1].add(census)
        ask_anew()  # whether the files are what they were
        for directory, (corpus, census) in parts.items():
            final = corpus.parts(count)[index - 1]
            corpus.check_unchanged()
            seal(directory, "documents", corpus.made_of, counts_of(census))
            settle(directory, final)
            corpus.load_part(final, count)  # uploads it
    finally:
        for directory in parts:
            shutil.rmtree(directory, ignore_errors=True)


def tokenise_unit(job: _Job) -> Generator[int, None, Census]:
    """Tokenises one unit into the store, yields how many of its bytes are done, and returns what it counted.

    Runs in a worker.
    """
    config, source, file, left = job.corpus.config, job.corpus.source, job.unit.file, job.unit.size
    census, wanted = job.corpus.census(job.number), columns(source, config.examples)
    held: list[Documents] = []
    layouts: tuple[str, ...] = ()
    tokenizer = process_tokenizer(config.tokenizer, job.corpus.tokenizer)
    text = load_template(config.template, tokenizer) if job.corpus.weighted else tokenizer
    if job.corpus.weighted:
        with contextlib.closing(read_lumps(source, file, wanted, Census(skip=True))) as lumps:
            layouts = layouts_in(config, source, file, next(lumps, Lump(file, 1)))
    for lump in read_lumps(source, file, wanted, census, job.unit):
        held.append(documents_of(config, source, text, lump, census, layouts))
        if sum(len(each.tokens) for each in held) > _HELD_TOKENS:
            _write(job, held, census)
            held = []
        done = min(lump.size, left)
        left -= done
        yield done
    _write(job, held, census)
    yield left
    return census


def _write(job: _Job, held: list[Documents], census: Census) -> None:
    if not held:
        return
    found = Documents._make(None if column[0] is None else np.concatenate(column) for column in zip(*held, strict=True))
    before, together = census.counts["stored"], job.corpus.together
    census.counts["stored"] += len(found.lengths)
    first, count = before // together, len(found.lengths) // together
    numbers = documents.document_numbers(job.number, first, count).repeat(together)
    documents.append(job.directory, job.corpus.buckets, numbers, found)


def finish(corpus: Corpus, count: int) -> list[str]:
    """Gives the documents of a corpus their final name when all `count` parts are there; returns those that are not.

    Raises:
        ValueError: there are no documents.
    """
    parts = corpus.parts(count)
    made = parts[0].parent
    try:
        if not corpus.load():
            found = {part: corpus.load_part(part, count) for part in parts}
            lacking = [f"{corpus.name}: {part.name} of {count}" for part, census in found.items() if census is None]
            if lacking and not corpus.load():
                return lacking
            if not lacking:
                _join(corpus, found)
    except OSError:
        if not corpus.load():  # else another machine has made it of these parts, and removed them
            raise
    if made.exists():
        forget(made.parent, made.name)
    return []


def _join(corpus: Corpus, parts: Mapping[Path, Census | None]) -> None:
    """All parts become the documents of a corpus."""
    census, made = corpus.census(), next(iter(parts)).parent
    for each in filter(None, parts.values()):
        census.add(each)
    if not census.counts["stored"]:
        forget(made.parent, made.name)
        raise ValueError(no_documents(corpus, census))
    for part in parts:
        pull(part)
    seal(made, "documents", corpus.made_of, {"fingerprint": corpus.fingerprint, **counts_of(census)})
    settle(made, corpus.place)
    corpus.load()  # uploads it
    forget(made.parent, made.name)


def no_documents(corpus: Corpus, census: Census) -> str:
    """What to say of a corpus of which nothing can be learned."""
    counts = census.counts
    seen = {"empty": counts["empty"], "without an answer to learn": counts["dropped"], "bad": census.bad}
    found = ", ".join(f"{count} {what}" for what, count in seen.items() if count)
    first = "".join(f"; {message}" for message in census.bad_examples[:1])
    has = f"{found} records{first}" if found else "no records"
    return f"{nothing_in(corpus.source, corpus.files)}, which has {has}"
