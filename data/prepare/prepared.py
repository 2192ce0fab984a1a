"""Tokenise every source once, and pack it once per length and seed, into a cache that no later run can mistake.

Two passes. Each part (one machine's share; usually there is one part) reads its units of the files, tokenises them and
puts the documents into buckets. When all parts are there, they are the document store of the source. From it each
bucket is sorted, packed and written as one shard. The rows do not depend on the number of parts or workers.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from mixtral_jax.data.config import DataConfig
from mixtral_jax.data.prepare.cache import PreparedSource, Use, check_writable, digest, locked, open_cache
from mixtral_jax.data.prepare.hashes import hash_files
from mixtral_jax.data.prepare.pack import pack
from mixtral_jax.data.prepare.recipe import Corpus, Recipe, recipe_of
from mixtral_jax.data.prepare.tokenise import finish, tokenise
from mixtral_jax.data.prepare.workers import Workers
from mixtral_jax.data.progress import say
from mixtral_jax.data.records import choose, stage_in, text_size_estimate
from mixtral_jax.data.rows import ORDER, GlobalOrder, Mixture, Position, order_from, shares
from mixtral_jax.data.text import load_tokenizer

_SERIAL_BYTES = 8 << 20  # less text than this is not worth starting processes for


@dataclass(frozen=True)
class PreparedData:
    """All sources of a run as rows on disk."""

    config: DataConfig
    seed: int
    train: tuple[PreparedSource, ...]
    validation: tuple[PreparedSource, ...]
    missing_parts: tuple[str, ...] = ()  # that other machines still have to make; the sources are then empty
    fresh: bool = False  # made just now, at least in part
    uses: tuple[Use, ...] = field(default=(), repr=False, compare=False)  # nobody removes the rows meanwhile

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

    def readings(self) -> list[str]:
        """How the records of each source were read, and a warning where their texts hold control tokens."""
        return [f"{what}/{line}" for what, source in self._named for line in _readings(source)]

    def summary(self) -> str:
        """A line for each source: tokens, padding, what was split, cut, dropped or bad."""
        return "\n".join(f"{what}/{_describe(source)}" for what, source in self._named)

    @property
    def _named(self) -> list[tuple[str, PreparedSource]]:
        return [*(("train", source) for source in self.train), *(("validation", source) for source in self.validation)]


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
    stage_in(config.staging_dir, config.staging_bytes)
    tokenizer = load_tokenizer(config.tokenizer)
    learned = config.train if train else ()
    chosen = [(s, choose(s)) for s in (*learned, *config.validation)]
    hash_files([file for _, choice in chosen for file in choice.files], open_cache(config.cache_dir), progress)
    recipes = [recipe_of(config, s, tokenizer, seq_len, seed, config.packing) for s in chosen[: len(learned)]]
    held_out = [recipe_of(config, s, tokenizer, seq_len, 0, "best_fit") for s in chosen[len(learned) :]]
    uses = tuple(Use(r.place.parent, r.place.name) for r in recipes + held_out)
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
        uses=uses,
    )


def _make(recipes: list[Recipe], part: tuple[int, int], workers: int, show: bool) -> list[str]:
    """Both passes over `recipes`, which all processes have in one order: locks taken in it cannot block for good."""
    if not recipes:
        return []
    check_writable(recipes[0].place.parent)
    index, count = part
    corpora = {r.corpus.fingerprint: r.corpus for r in recipes}
    ordered = [corpora[key] for key in sorted(corpora)]
    size = sum(text_size_estimate(corpus.files) for corpus in ordered)
    processes = (workers or _cores()) if size > _SERIAL_BYTES else 1
    with Workers(processes) as pool:
        with _locks(ordered, f".part-{index}-of-{count}", show):
            tokenise(ordered, index, count, pool, show)
        with _locks(ordered, "", show):
            missing = {corpus.fingerprint: finish(corpus, count) for corpus in ordered}
        whole = [r for r in recipes if not missing[r.corpus.fingerprint]]
        with _locks(whole, "", show), ExitStack() as uses:
            for recipe in whole:
                uses.callback(Use(recipe.corpus.place.parent, recipe.corpus.place.name).end)
            pack(whole, pool, show)
    return [name for names in missing.values() for name in names]


@contextmanager
def _locks(made: Sequence[Corpus | Recipe], suffix: str, show: bool) -> Iterator[None]:
    with ExitStack() as locks:
        for each in made:
            path = each.place.parent / "locks" / f"{each.place.name}{suffix}"
            waiting = f"source {each.name!r}: waiting for another process that prepares it ({path})"
            locks.enter_context(locked(path, waiting, say if show else lambda _: None))
        yield


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(source: PreparedSource) -> str:
    what, lost = f"{source.documents:,} documents", "without an answer to learn, or with it behind the end of a row"
    if source.format.pairs:
        what, lost = f"{source.documents // 2:,} pairs", "equal where cut to a row, or without an answer to learn"
    text = (
        f"{source.name}: {what}, {source.tokens:,} tokens in {source.rows:,} rows of "
        f"{source.format.seq_len:,}, {100 * source.padding:.2f} % padding, {source.split:,} documents split"
    )
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
    assert prepared is not None, f"{recipe.name} was just prepared and is gone"
    return prepared.model_copy(update={"described": recipe.corpus.described})
