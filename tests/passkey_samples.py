"""The samples from which a small model learns passkey retrieval, made again byte for byte.

python -m tests.passkey_samples data/samples/sft
"""

import gzip
import json
import sys
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from mixtral_jax.data.text.passkey import FILLER, KEYS, NEEDLE, QUESTION, TASK

NEAR, FAR = 30, 210  # words of filler


def passkey_text(key: int, before: int, after: int) -> dict[str, str]:
    """{"prompt", "completion"} with so many words of filler before and after the sentences that say the key."""
    fillers = [" ".join(islice(cycle(FILLER.split()), words)) for words in (before, after)]
    lines = (TASK, fillers[0], NEEDLE.format(key=key), fillers[1], QUESTION)
    return {"prompt": "\n".join(filter(None, lines)), "completion": f" {key}"}


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


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
