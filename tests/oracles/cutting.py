"""How one example is cut to a row, by lists."""

from typing import NamedTuple


class Example(NamedTuple):
    """Tokens that begin with BOS, and which of them are learned."""

    tokens: list[int]
    learned: list[bool]


def cut(example: Example, count: int, end: int) -> Example:
    """The first `end` tokens, without the `count` after its first."""
    tokens, learned = example
    return Example(tokens[:1] + tokens[1 + count : end], learned[:1] + learned[1 + count : end])


def fit(pair: tuple[Example, Example], size: int) -> tuple[Example, Example]:
    """A pair in `size` tokens: each sequence has at most half, completions at least half of that half."""
    prompt = min(example.learned.index(True) for example in pair)
    if sum(len(e.tokens) for e in pair) <= size:
        return pair
    half = size // 2
    room = max(half - prompt, half // 2)
    longest = min(room, max(len(e.tokens) for e in pair) - prompt)
    kept = half - longest  # of the prompt
    chosen, rejected = (cut(example, max(0, prompt - kept), prompt + room) for example in pair)
    return chosen, rejected


def fate(examples: tuple[Example, ...], size: int) -> tuple[tuple[Example, ...], str]:
    """What is left of a chat (one) or a pair (two), and what that is called."""
    kept = fit(examples, size) if len(examples) == 2 else (cut(examples[0], 0, size),)
    if not all(any(each.learned) for each in kept) or kept[0] in kept[1:]:
        return (), "dropped"
    return kept, "truncated" if kept != examples else "whole"
