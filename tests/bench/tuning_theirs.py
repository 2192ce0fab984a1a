"""TRL's trainers on the same rows: `python -m tests.bench.tuning_theirs SHAPE STEPS sft|dpo PROMPT` prints JSON.

Settings are TRL's own, but for fp32 (its default is bf16), the lengths and the batch.
"""

import json
import resource
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests.bench.shapes import LEARNING_RATE, Shape, parse
from tests.bench.theirs import model_of


class Clock(TrainerCallback):
    """Seconds of each step, data included."""

    def __init__(self) -> None:
        self.began, self.times = 0.0, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self.began)


def words_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each token id. It ends in ;, or a special one would be found inside others: w1 in w17."""
    words = Tokenizer(models.WordLevel({f"w{i};": i for i in range(vocab)}, unk_token="w0;"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2;", eos_token="w1;", unk_token="w0;")


def trainer_of(shape: Shape, steps: int, kind: str, share: float, directory: str) -> Any:
    """SFTTrainer on rows of seq_len tokens, or DPOTrainer on half as many pairs of them; `share` of each is prompt."""
    rng, T, prompt = np.random.default_rng(0), shape.seq_len, int(shape.seq_len * share)
    common = dict(
        output_dir=directory, report_to=[], use_cpu=True, bf16=False, max_steps=steps, save_strategy="no",
        learning_rate=LEARNING_RATE, max_length=T, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip

    def words(count: int) -> str:
        return " ".join(f"w{i};" for i in rng.integers(3, shape.vocab, count)) + " "

    tokenizer, model = words_tokenizer(shape.vocab), model_of(shape)
    if kind == "dpo":
        rows = [
            {"prompt": words(prompt), "chosen": words(T - prompt - 1), "rejected": words(T - prompt - 1)}
            for _ in range(shape.batch // 2 * steps)
        ]
        dpo = DPOConfig(per_device_train_batch_size=shape.batch // 2, **common)
        return DPOTrainer(model, model_of(shape), args=dpo, train_dataset=Dataset.from_list(rows),
                          processing_class=tokenizer)  # fmt: skip
    mask = [0] * prompt + [1] * (T - prompt)
    rows = [
        {"input_ids": rng.integers(3, shape.vocab, T).tolist(), "completion_mask": mask}
        for _ in range(shape.batch * steps)
    ]
    sft = SFTConfig(per_device_train_batch_size=shape.batch, completion_only_loss=True, **common)
    return SFTTrainer(model, args=sft, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def measure(shape: Shape, steps: int, kind: str, share: float) -> dict[str, float]:
    """Median seconds of a step, and the peak memory of the process."""
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(shape, steps + 2, kind, share, directory)
        trainer.add_callback(clock)
        trainer.train()
    loss = next(line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line)
    return {
        "seconds": float(np.median(clock.times[2:])), "loss": loss,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


if __name__ == "__main__":
    print("\n" + json.dumps(measure(parse(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))))
