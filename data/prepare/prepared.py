"""Tokenise and pack every source once, in parallel, into a cache that no later run can mistake.

Two steps. Each part (one machine's share; usually there is one part) reads the files, tokenises its lumps and spills
the documents into buckets. When all parts are there, each bucket is sorted, packed and written as one shard. The rows
do not depend on the number of parts or workers.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import spill
from mixtral_jax.data.prepare.build import Recipe, pack, tokenise
from mixtral_jax.data.prepare.cache import FORMAT_VERSION, PreparedSource, content_hash, digest, locked
from mixtral_jax.data.prepare.workers import Workers
from mixtral_jax.data.progress import meter, say
from mixtral_jax.data.records import choose, sources, text_size_estimate, with_text_column
from mixtral_jax.data.rows import ORDER, GlobalOrder, Mixture, Position, RowFormat, order_from, shares
from mixtral_jax.data.text import LAYOUT_VERSION, Tokenizer, columns, load_template, load_tokenizer, token_dtype

_SERIAL_BYTES = 8 << 20  # less text than this is not worth starting processes for


@dataclass(frozen=True)
class PreparedData:
    """All sources of a run as rows on disk."""

    config: DataConfig
    seed: int
    train: tuple[PreparedSource, ...]
    validation: tuple[PreparedSource, ...]
    missing_parts: tuple[str, ...] = ()  # with `part`: parts that other machines still have to make
    fresh: bool = False  # made just now, at least in part

    @functools.cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """The phases of the run: from which step on which share of the rows each source has."""
        rows, prints = {s.name: s.rows for s in self.train}, self.sources
        mixtures = []
        for phase in self.config.mixed:
            parts = shares(rows, phase.weights, phase.temperature)
            read = [(name, prints[name], rows[name], str(part)) for name, part in sorted(parts.items())]
            made_of = {"order": ORDER, "seed": self.seed, "sources": read}
            mixtures.append(Mixture(phase.from_step, parts, digest(made_of)))
        return tuple(mixtures)

    @property
    def sources(self) -> dict[str, str]:
        """Fingerprint of the rows of each training source."""
        return {source.name: source.fingerprint for source in self.train}

    @property
    def fingerprint(self) -> str:
        """Of all rows that the run reads and of their order."""
        return digest([(mixture.from_step, mixture.fingerprint) for mixture in self.mixtures])

    def order_from(self, position: Position, global_batch_size: int) -> GlobalOrder:
        """Which row of which training source is row r of the run, from a position on."""
        rows = {source.name: source.rows for source in self.train}
        return order_from(position, self.seed, rows, self.sources, self.mixtures, global_batch_size)

    @property
    def complete(self) -> bool:
        """False while parts are missing; the sources are then empty."""
        return not self.missing_parts

    def readings(self) -> list[str]:
        """How the records of each source were read, and a warning where their texts hold control tokens."""
        return [
            f"{what}/{line}"
            for what, sources in (("train", self.train), ("validation", self.validation))
            for source in sources
            for line in _readings(source)
        ]

    def summary(self) -> str:
        """A line for each source: tokens, padding, what was split, cut, dropped or bad."""
        lines = [f"train/{_describe(source)}" for source in self.train]
        lines += [f"validation/{_describe(source)}" for source in self.validation]
        return "\n".join(lines)


def prepare(
    config: DataConfig,
    seq_len: int,
    seed: int,
    part: tuple[int, int] | None = None,
    progress: bool = True,
    *,
    train: bool = True,
) -> PreparedData:
    """Rows of `seq_len` + 1 tokens of every source, from the cache where they are there.

    Validation sources are packed with best_fit and seed 0: each document begins at its own BOS, and no row order
    matters there; with `train` false they are the only ones. With `part` (i, n), 1 <= i <= n, this does only the i-th
    of n shares, and packs if it is the last.

    Raises:
        ValueError: no files, no documents, a bad record (file, line), no tokenizer, a part out of range.
    """
    index, count = part or (1, 1)
    if not 1 <= index <= count:
        raise ValueError(f"part {index}/{count}: the first number counts from 1 to the second")
    tokenizer = load_tokenizer(config.tokenizer)
    learned = config.train if train else ()
    recipes = [_recipe(config, s, tokenizer, seq_len, seed, config.packing) for s in learned]
    held_out = [_recipe(config, s, tokenizer, seq_len, 0, "best_fit") for s in config.validation]
    todo = {r.fingerprint: r for r in recipes + held_out if not r.load()}
    missing = _make([todo[key] for key in sorted(todo)], (index, count), config.workers, progress)
    if missing:
        return PreparedData(config, seed, (), (), tuple(missing))
    return PreparedData(
        config,
        seed,
        train=tuple(_loaded(r) for r in recipes),
        validation=tuple(_loaded(r) for r in held_out),
        fresh=bool(todo),
    )


def _make(recipes: list[Recipe], part: tuple[int, int], workers: int, show: bool) -> list[str]:
    """Both passes over `recipes`, which all processes have in one order: locks taken in it cannot block for good."""
    if not recipes:
        return []
    index, count = part
    size = sum(text_size_estimate(r.files) for r in recipes)
    processes = (workers or _cores()) if size > _SERIAL_BYTES else 1
    with Workers(processes) as pool:
        with meter("Tokenising", size, show=show) as advance, _locks(recipes, f".part-{index}-of-{count}", show):
            tokenise(recipes, index, count, pool, advance)
        with meter("Packing", size // count, show=show) as advance, _locks(recipes, "", show):
            return pack(recipes, count, pool, advance)


@contextmanager
def _locks(recipes: list[Recipe], suffix: str, show: bool) -> Iterator[None]:
    with ExitStack() as locks:
        for recipe in recipes:
            path = recipe.place.parent / "locks" / f"{recipe.place.name}{suffix}"
            waiting = f"source {recipe.source.name!r}: waiting for another process that prepares it ({path})"
            locks.enter_context(locked(path, waiting, say if show else lambda _: None))
        yield


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(source: PreparedSource) -> str:
    what = f"{source.documents:,} documents"
    if source.format.pairs:
        what = f"{source.documents // 2:,} pairs"
    text = (
        f"{source.name}: {what}, {source.tokens:,} tokens in {source.rows:,} rows of "
        f"{source.format.seq_len:,}, {100 * source.padding:.2f} % padding, {source.split:,} documents split"
    )
    lost = "without an answer to learn, or with it behind the end of a row"
    lost = "equal where cut to a row, or without an answer to learn" if source.format.pairs else lost
    counts = {"cut to a row": source.truncated, lost: source.dropped}
    counts |= {"empty": source.empty, "bad records passed over": source.bad}
    text += "".join(f", {count:,} {what}" for what, count in counts.items() if count)
    return "\n  ".join([text, f"of {source.described}", *source.bad_examples])


def _readings(source: PreparedSource) -> list[str]:
    """Of one source, if it has chats or pairs."""
    lines = []
    if source.layouts:
        first, *others = (f"{count:,}{{}} as {name}" for name, count in source.layouts.items())
        lines.append(
            ", ".join([f"{source.name}: {first.format(' records are read')}", *(o.format("") for o in others)])
        )
    if source.control_words:
        lines.append(
            f"{source.name}: warning: {source.control_words:,} examples hold words such as <s> or [INST], which are "
            "text here and no control tokens: take them out, as the template puts its own around each turn"
        )
    return lines


def _loaded(recipe: Recipe) -> PreparedSource:
    prepared = recipe.load()
    assert prepared is not None, f"{recipe.source.name} was just prepared and is gone"
    return prepared.model_copy(update={"described": recipe.described})


def _recipe(
    config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, seq_len: int, seed: int, packing: str
) -> Recipe:
    files, described = choose(source)
    if config.examples == "text" and (found := with_text_column(source, files)) != source:
        source, described = found, f"{described}; texts from column {found.text_key!r}"
    weighted = config.examples != "text"
    pairs = config.pairs_per_row if config.examples == "preference" else 0
    buckets = 1 + text_size_estimate(files) // spill.BUCKET_BYTES
    identity = {
        "version": FORMAT_VERSION,
        "shuffle": [seed, sources.LUMP_BYTES, buckets],
        "content": [content_hash(file, Path(config.cache_dir)) for file in files],
        "format": source.format,
        "split": source.split,
        "columns": columns(source, config.examples),
        "tokenizer": tokenizer.fingerprint(),
        "examples": config.examples,
        "chat": [load_template(config.template, tokenizer).format.model_dump(), config.train_on] if weighted else None,
        "seq_len": seq_len,
        "packing": packing,
        "on_error": config.on_error,
    }
    if weighted:
        identity["layout"] = [source.layout, LAYOUT_VERSION]
    if pairs:
        identity["pairs_per_row"] = pairs
    return Recipe(
        config=config,
        source=source,
        files=files,
        described=described,
        packing="best_fit" if weighted else packing,
        seed=seed,
        buckets=buckets,
        format=RowFormat(seq_len, token_dtype(tokenizer.vocab_size), weighted, pairs),
        fingerprint=digest(identity),
    )
