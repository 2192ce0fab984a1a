"""What decides the documents of a source, and what decides its rows: all that changes them and nothing else."""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import documents
from mixtral_jax.data.prepare.cache import (
    FORMAT_VERSION,
    PreparedSource,
    digest,
    entry_meta,
    load_prepared,
    open_cache,
    remember,
    whole,
)
from mixtral_jax.data.prepare.hashes import content_hash
from mixtral_jax.data.records import (
    Census,
    Chosen,
    Unit,
    compression,
    file_format,
    sources,
    text_size_estimate,
    units_of,
    with_text_column,
)
from mixtral_jax.data.rows import RowFormat
from mixtral_jax.data.text import LAYOUT_VERSION, SHORTEST_PAIR, Tokenizer, columns, load_template, token_dtype


@dataclass(frozen=True)
class Corpus:
    """The documents of one source: all that decides them, and where they are kept."""

    config: DataConfig
    source: SourceConfig
    files: tuple[str, ...]
    content: tuple[Any, ...]  # of each file
    described: str
    buckets: int
    tokenizer: str  # its fingerprint
    token_dtype: str
    fingerprint: str
    place: Path  # the directory of the documents; what is not finished lies beside it

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def weighted(self) -> bool:
        """Whether some of the tokens are not learned."""
        return self.config.examples != "text"

    @property
    def together(self) -> int:
        """How many documents in turn have one number: both sequences of a pair stay neighbours."""
        return 2 if self.config.examples == "preference" else 1

    def parts(self, count: int) -> list[Path]:
        """Directories of the documents, as each of `count` machines tokenises them."""
        return [self.place.with_name(f"{self.place.name}.parts-of-{count}") / f"part-{i + 1}" for i in range(count)]

    @property
    def short(self) -> "Corpus":
        """Itself without its files, which may be many."""
        return replace(self, files=(), content=())

    def check_unchanged(self) -> None:
        """Raises ValueError unless the files still hold what the fingerprint says."""
        for file, content in zip(self.files, self.content, strict=True):
            if content_hash(file, self.place.parent) != content:
                raise ValueError(f"{file} was changed while it was read: prepare the data when nothing writes to it")

    def census(self, unit: int = 0) -> Census:
        """Nothing counted yet."""
        return Census(self.config.on_error == "skip", unit)

    @functools.cached_property
    def units(self) -> list[Unit]:
        """All units of its files, in order."""
        return [unit for file in self.files for unit in units_of(self.source, file)]

    def load(self) -> Census | None:
        """What was counted when the documents were made; None where they are not there, or not whole."""
        meta = entry_meta(self.place.parent, self.place.name)
        return None if meta is None or meta.get("fingerprint") != self.fingerprint else read_counts(meta)

    def load_part(self, part: Path, count: int) -> Census | None:
        """The same of one of `count` parts; of several machines, which may have nothing but the cache in common."""
        meta = whole(part) if count == 1 else entry_meta(self.place.parent, f"{part.parent.name}/{part.name}")
        return None if meta is None else read_counts(meta)

    @property
    def made_of(self) -> dict[str, Any]:
        """What people want to know of the documents."""
        return {"source": self.name, "files": self.described, "tokenizer": self.config.tokenizer}


@dataclass(frozen=True)
class Recipe:
    """Rows of one length, seed and packing, of the documents of a source."""

    corpus: Corpus
    packing: str
    seed: int
    format: RowFormat
    fingerprint: str
    place: Path  # the directory of the rows

    @property
    def name(self) -> str:
        """The source's."""
        return self.corpus.name

    def shard(self, bucket: int) -> str:
        """Name of the file of the rows of a bucket."""
        return f"rows-{bucket:05d}-of-{self.corpus.buckets:05d}.array_record"

    def load(self) -> PreparedSource | None:
        """The prepared source, where it is there."""
        return load_prepared(self.place.parent, self.name, self.fingerprint)


def read_counts(meta: Mapping[str, Any]) -> Census:
    """What `counts_of` made of a census."""
    kept = meta["census"]
    counts, layouts = Counter(kept["counts"]), Counter(kept["layouts"])
    return Census(skip=True, bad=kept["bad"], first=kept["first"], counts=counts, layouts=layouts)


def counts_of(census: Census) -> dict[str, Any]:
    """A census as JSON can hold it; here the lines before a bad record are counted."""
    first = [(unit, str(where), what) for unit, where, what in census.first]
    return {"census": {"counts": census.counts, "layouts": census.layouts, "bad": census.bad, "first": first}}


def recipe_of(
    config: DataConfig, chosen: tuple[SourceConfig, Chosen], tokenizer: Tokenizer, seq_len: int, seed: int, packing: str
) -> Recipe:
    """The recipe of a source, of which `chosen` are the files.

    Raises:
        ValueError: a template that does not fit, or rows too short for pairs.
    """
    corpus = _corpus(config, chosen, tokenizer)
    packing = "best_fit" if corpus.weighted else packing
    pairs = config.pairs_per_row if corpus.together == 2 else 0
    if pairs and seq_len + 1 < SHORTEST_PAIR:
        raise ValueError(f"seq_len: a row of {seq_len} is too short for a pair: make it {SHORTEST_PAIR - 1} or more")
    fingerprint = digest([FORMAT_VERSION, corpus.fingerprint, seed, seq_len, packing, pairs])
    format_ = RowFormat(seq_len, corpus.token_dtype, corpus.weighted, pairs)
    return Recipe(corpus, packing, seed, format_, fingerprint, corpus.place.with_name(fingerprint[:24]))


def _corpus(config: DataConfig, chosen: tuple[SourceConfig, Chosen], tokenizer: Tokenizer) -> Corpus:
    source, (files, described) = chosen
    kind, cache = config.examples, open_cache(config.cache_dir)
    content = tuple(content_hash(file, cache) for file in files)
    formats = [(file_format(source, file), compression(file)) for file in files]
    if kind == "text" and source.text_key == "text":  # its first rows say it, which may be far away: so once for all
        memo = f"hashes/{digest(['text_key', content, formats, source.split])}"
        found = remember(cache, memo, lambda: with_text_column(source, files).text_key)
        if found != source.text_key:
            source = source.model_copy(update={"text_key": found})
            described = f"{described}; texts from column {found!r}"
    buckets = 1 + text_size_estimate(files) // documents.BUCKET_BYTES
    identity: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "units": [sources.UNIT_BYTES, sources.TEXT_PIECE_BYTES, buckets],
        "content": content,
        "formats": formats,
        "tokenizer": tokenizer.fingerprint(),
        "examples": kind,
        "on_error": config.on_error,
    }
    if any(format_ in sources.SETS for format_, _ in formats):
        identity["split"] = source.split
    if {format_ for format_, _ in formats} != {"text"}:
        identity["columns"] = columns(source, kind)
    if kind != "text":
        identity["template"] = load_template(config.template, tokenizer).format.model_dump()
        identity["layout"] = [source.layout, LAYOUT_VERSION]
    if kind == "chat":
        identity["train_on"] = config.train_on
    fingerprint = digest(identity)
    return Corpus(
        config=config,
        source=source,
        files=files,
        content=content,
        described=described,
        buckets=buckets,
        tokenizer=tokenizer.fingerprint(),
        token_dtype=token_dtype(tokenizer.vocab_size),
        fingerprint=fingerprint,
        place=cache / fingerprint[:24],
    )
