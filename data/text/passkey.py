"""Passkey retrieval: a number said once in much text that says nothing, asked for at the end.

The prompt is that of Landmark Attention (Mohtashami & Jaggi 2305.16300), with which the left of figure 4 of Mixtral
(2401.04088, section 3.2) is measured.
"""

import gzip
import json
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

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


def passkey_text(key: int, before: int, after: int) -> dict[str, str]:
    """{"prompt", "completion"} with so many words of filler before and after the sentences that say the key."""
    fillers = [" ".join(islice(cycle(FILLER.split()), words)) for words in (before, after)]
    lines = (TASK, fillers[0], NEEDLE.format(key=key), fillers[1], QUESTION)
    return {"prompt": "\n".join(filter(None, lines)), "completion": f" {key}"}


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


def write_samples(directory: Path) -> None:
    """passkey.{near,short,train,val}.jsonl.gz: no filler, up to 16 and up to 210 words; no key is in two of them.

    Without filler there is no task either, and all that follows the first mention is learned, so that most tokens teach
    to copy: a small model needs hundreds of steps for that where nothing but long prompts asks for it.
    """
    rng = np.random.default_rng(0)
    keys = rng.permutation(np.arange(*KEYS)).tolist()
    for name, count, most in (("near", 4000, 0), ("short", 2000, 16), ("train", 3000, 210), ("val", 100, 210)):
        own, keys, words = keys[:count], keys[count:], rng.integers(0, most, count, endpoint=True)
        numbers = zip(own, words.tolist(), rng.integers(0, words, endpoint=True).tolist(), strict=True)
        records = [passkey_text(key, before, n - before) if most else _near(key) for key, n, before in numbers]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"passkey.{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def _near(key: int) -> dict[str, str]:
    said, again = f"{NEEDLE.format(key=key)}\n{QUESTION} {key}".split(f" {key} is", 1)
    return {"prompt": said, "completion": f" {key} is{again}"}
