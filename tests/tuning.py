"""Small data and run files for the tests of fine-tuning."""

import json
from pathlib import Path

import numpy as np

from mixtral_jax.data.text.examples import encoded
from mixtral_jax.data.text.layouts import normalise
from tests.tiny import WORDS, write_run_file


def write_tuning_file(directory: Path, stage: str, **changes) -> Path:
    """An SFT or DPO file of a few steps over short prompts and answers; see tests.tiny.write_run_file."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)

    def text(n):
        return " ".join(rng.choice(WORDS, n))

    for name, count in (("train", 24), ("val", 5)):
        records = []
        for i in range(count):
            record = {"prompt": text(1 + i % 2)}
            if stage == "sft":
                record["completion"] = text(1 + i % 3)
            else:
                record |= {"chosen": text(1 + i % 2), "rejected": "no " + text(1)}
            records.append(json.dumps(record))
        (directory / f"{stage}-{name}.jsonl").write_text("\n".join(records) + "\n")
    data = {
        "train": [{"name": "answers", "path": str(directory / f"{stage}-train.jsonl")}],
        "validation": [{"name": "answers", "path": str(directory / f"{stage}-val.jsonl")}],
    }
    common = {
        "stage": stage, "seq_len": 64, "global_batch_size": 4, "steps": 3, "checkpoint": {"every": None},
        "optimizer": {"warmup_steps": 0, "schedule": "constant"},
    }  # fmt: skip
    merged = common | changes
    merged["data"] = data | changes.get("data", {})
    return write_run_file(directory, **merged)


def chat_example(record, source, template, train_on="all"):
    """The sequence of a record of a chat, in any layout."""
    shape = normalise(record, source, "chat")[1]
    assert shape is not None
    (example,) = encoded(shape, source, template, train_on)
    return example


def preference_pair(record, source, template):
    """The chosen and the rejected sequence of a record of a preference, in any layout."""
    chosen, rejected = encoded(normalise(record, source, "preference")[1], source, template)
    return chosen, rejected
