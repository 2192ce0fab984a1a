"""TRL's trainers on the same rows: `python -m tests.bench.tuning_theirs SHAPE sft|lora|dpo PROMPT [OPTIONS]`.

Settings are TRL's own, but for the precision (its default is bf16 beside fp32 weights), the lengths and the batch.
"""

import queue
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests.bench.shapes import LEARNING_RATE, Options, Shape, parse
from tests.bench.theirs import DEVICE, device_facts, model_of
from tests.bench.worker import serve

STEPS_AT_MOST = 60  # for which there are rows
LORA = {  # as ours: attention and experts
    "r": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


class Gate(TrainerCallback):
    """Holds the trainer between its steps; `step` lets it take one, with its logging and the data of the next."""

    def __init__(self) -> None:
        self.orders, self.answers = queue.Queue[None](), queue.Queue[str | None]()

    def run(self, train: Callable[[], object]) -> None:
        """Start the trainer in a thread of its own; returns in front of its first step."""

        def target() -> None:
            ended = "it took all the steps that it has rows for"
            try:
                train()
            except Exception as error:
                ended = repr(error)
            self.answers.put(ended)

        threading.Thread(target=target, daemon=True).start()
        self.wait()

    def wait(self) -> None:
        """Until the trainer stands in front of a step."""
        ended = self.answers.get()
        if ended is not None:
            raise RuntimeError(f"the trainer ended: {ended}")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Say that all before this step is done, and wait for an order."""
        self.answers.put(None)
        self.orders.get()

    def step(self, index: int) -> None:
        """One step of the trainer."""
        self.orders.put(None)
        self.wait()


def words_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word for each token id. It ends in ;, or a special one would be found inside others: w1 in w17."""
    words = Tokenizer(models.WordLevel({f"w{i};": i for i in range(vocab)}, unk_token="w0;"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2;", eos_token="w1;", unk_token="w0;")


def trainer_of(shape: Shape, steps: int, kind: str, share: float, directory: str, options: Options) -> Any:
    """SFTTrainer on rows of seq_len tokens, or DPOTrainer on half as many pairs of them; `share` of each is prompt."""
    rng, T, prompt = np.random.default_rng(0), shape.seq_len, int(shape.seq_len * share)
    common = dict(
        output_dir=directory, report_to=[], use_cpu=DEVICE == "cpu", bf16=options.dtype == "bfloat16", max_steps=steps,
        save_strategy="no", learning_rate=LEARNING_RATE, max_length=T, disable_tqdm=True,
        gradient_checkpointing=options.checkpointing,
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
    how = dict(completion_only_loss=True, packing=options.packing, per_device_train_batch_size=shape.batch)
    sft = SFTConfig(**how, **common)
    adapters = LoraConfig(**LORA) if kind == "lora" else None
    return SFTTrainer(
        model, args=sft, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapters
    )


def prepare(shape: Shape, kind: str, share: float, directory: str, options: Options) -> Callable[[int], None]:
    """The trainer as a function that takes one step of it."""
    torch.manual_seed(0)
    gate = Gate()
    trainer = trainer_of(shape, STEPS_AT_MOST, kind, share, directory, options)
    trainer.add_callback(gate)
    gate.run(trainer.train)
    return gate.step


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        options = Options.of(sys.argv[4:])
        serve(prepare(parse(sys.argv[1]), sys.argv[2], float(sys.argv[3]), folder, options), device_facts)
