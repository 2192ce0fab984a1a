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
NEAR, FAR = 30, 210  # words of filler


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
    """passkey.{same,near,train,val}.jsonl.gz: three steps to retrieval, and 100 prompts to look at.

    A small model learns where to look before it learns in which order to read: `same` has keys of one digit five
    times, for which it is enough to see the number at all, from far away too. `near` has all keys, no task and at most
    30 words of filler in between, at all distances: were there one, that distance would be learned. `train` has up to
    210 words, every other prompt few; `val` any number up to that. No key of `near`, `train` and `val` is in two.
    """
    rng = np.random.default_rng(0)
    keys = iter(rng.permutation(np.arange(*KEYS)).tolist())

    def few() -> int:
        return int(np.exp(rng.uniform(0, np.log(FAR + 2))) - 1)

    def any_number(most: int) -> int:
        return int(rng.integers(0, most, endpoint=True))

    def placed(key: int, words: int) -> dict[str, str]:
        before = any_number(words)
        return passkey_text(key, before, words - before)

    def near(key: int, words: int) -> dict[str, str]:
        record = passkey_text(key, 0, words)
        return {**record, "prompt": record["prompt"].removeprefix(f"{TASK}\n")}

    made = {
        "same": [placed(11_111 * (1 + any_number(8)), few()) for _ in range(1000)],
        "near": [near(next(keys), any_number(NEAR)) for _ in range(8000)],
        "train": [placed(next(keys), few() if i % 2 else any_number(FAR)) for i in range(8000)],
        "val": [placed(next(keys), any_number(FAR)) for _ in range(100)],
    }
    for name, records in made.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"passkey.{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
