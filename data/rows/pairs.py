"""Preference pairs: two sequences that begin with the same prompt, kept together from the record to the batch.

A row of T positions holds both sequences of a pair as two segments, and of further pairs where `pairs_per_row` lets
it: segment 2k + 1 is the chosen and 2k + 2 the rejected sequence of pair k. A pair is never split.
"""

from typing import NamedTuple

import numpy as np

from mixtral_jax.data.config import SourceConfig
from mixtral_jax.data.records.lump import Lump, Problems
from mixtral_jax.data.text.examples import ChatFormat, Documents, Example, Pair, preference_pair, token_dtype


class PairRow(NamedTuple):
    """One row of K pairs as the model sees it."""

    tokens: np.ndarray  # (T,) int32
    targets: np.ndarray  # (T,) int32
    completion: np.ndarray  # (T,) int32: the target is the n-th token of its completion, counted from 1; 0: none
    segment_ids: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32
    lengths: np.ndarray  # (K, 2) int32: completion tokens of chosen and rejected
    mask: np.ndarray  # (K,) float32: 1 for a pair, 0 for filling
    ref_logps: np.ndarray  # (K, 2) float32: log-probabilities of the reference; 0 until one is asked

    @property
    def weights(self) -> np.ndarray:
        """(T,) float32: 1 where the target belongs to a completion."""
        return (self.completion > 0).astype(np.float32)


def pair_row(
    tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray,
    pairs: int,
) -> PairRow:  # fmt: skip
    """The numbers of a row's pairs, from the (T,) arrays of an ordinary row; `pairs` is K."""
    learned = weights > 0
    lengths = np.bincount(segment_ids[learned], minlength=2 * pairs + 1)[1:].astype(np.int32)
    before = np.concatenate([[0], np.cumsum(lengths)])  # completion tokens of the segments before
    completion = np.where(learned, np.cumsum(learned) - before[np.maximum(segment_ids, 1) - 1], 0).astype(np.int32)
    lengths = lengths.reshape(pairs, 2)
    mask = (lengths.min(axis=1) > 0).astype(np.float32)
    none = np.zeros((pairs, 2), np.float32)
    return PairRow(tokens, targets, completion, segment_ids, positions, lengths, mask, none)


def pair_documents(lump: Lump, source: SourceConfig, chat: ChatFormat, seq_len: int, problems: Problems) -> Documents:
    """Both sequences of each pair, one after the other: 2 documents a pair, cut to fit one row together."""
    examples: list[Example] = []
    truncated = dropped = 0
    for number, record in lump.parse(problems):
        try:
            pair = preference_pair(record, source, chat)
            fitted = fit(pair, seq_len + 1)
        except (ValueError, UnicodeEncodeError) as error:
            problems.report(f"{lump.where(number)}: {error}")
            continue
        if fitted.chosen == fitted.rejected:  # they differ only behind the cut
            dropped += 1
            continue
        truncated += fitted != pair
        examples += fitted
    lengths = np.array([len(e.tokens) for e in examples], np.int64)
    tokens = np.array([t for e in examples for t in e.tokens], token_dtype(chat.tokenizer.vocab_size))
    weights = np.array([w for e in examples for w in e.weights], np.float16)
    return Documents(tokens, lengths, weights, text_bytes=0, truncated=truncated, dropped=dropped)


def fit(pair: Pair, size: int) -> Pair:
    """The pair in `size` tokens. One that is longer is cut so that each sequence takes at most half.

    Completions lose their ends first, down to half of that half; then the prompt loses its beginning, but for BOS.
    Both sequences keep the same prompt.

    Raises:
        ValueError: a sequence does not begin with a prompt, or a row is too short.
    """
    prompt = min(_prompt_length(pair.chosen), _prompt_length(pair.rejected))
    if not prompt:
        raise ValueError("there is no prompt before the answers")
    if sum(len(e.tokens) for e in pair) <= size:
        return pair
    half = size // 2
    if half < 4:
        raise ValueError(f"a row of {size} tokens is too short for a pair")
    room = max(half - prompt, half // 2)
    longest = min(room, max(len(e.tokens) for e in pair) - prompt)
    kept = half - longest  # of the prompt
    cut = prompt - kept if prompt > kept else 0
    return Pair(*(_without(e.cut(prompt + room), cut) for e in pair))


def _without(example: Example, count: int) -> Example:
    """The example without the `count` tokens after the first."""
    return Example(example.tokens[:1] + example.tokens[1 + count :], example.weights[:1] + example.weights[1 + count :])


def _prompt_length(example: Example) -> int:
    return next((i for i, w in enumerate(example.weights) if w), len(example.weights))
