"""Passkey retrieval: a number said once in much text that says nothing, asked for at the end.

The prompt is that of Landmark Attention (Mohtashami & Jaggi 2305.16300), with which the left of figure 4 of Mixtral
(2401.04088, section 3.2) is measured.
"""

from itertools import cycle, islice
from typing import NamedTuple

from mixtral_jax.data.text.tokenizer import Tokenizer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
KEYS = (10_000, 100_000)  # five digits


class Passkey(NamedTuple):
    """A prompt and its one right answer, as ids."""

    prompt: list[int]  # from BOS on
    answer: list[int]


def passkey_ids(tokenizer: Tokenizer, key: int, length: int, depth: float) -> Passkey:
    """A prompt and its answer of exactly `length` tokens together.

    Args:
        depth: where in the filler the key stands: 0 at its beginning, 1 at its end.

    Raises:
        ValueError: fewer tokens than task, key and question take.
    """
    task = tokenizer.encode(TASK)
    rest = (f"\n{NEEDLE.format(key=key)}", f"\n{QUESTION}", f" {key}")
    needle, question, answer = (tokenizer.encode(text, "text") for text in rest)
    room = length - 1 - sum(map(len, (task, needle, question, answer)))
    if room < 0:
        raise ValueError(f"a length of {length} is too short: task, key and question alone take {length - room} tokens")
    before = round(depth * room)
    once = tokenizer.encode(f"\n{FILLER}", "text"), tokenizer.encode(f" {FILLER}", "text")
    fillers = [[*once[0], *islice(cycle(once[1]), size)][:size] for size in (before, room - before)]
    return Passkey([tokenizer.bos_id, *task, *fillers[0], *needle, *fillers[1], *question], answer)
