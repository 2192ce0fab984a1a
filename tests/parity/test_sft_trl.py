"""SFT's loss and gradients, balance loss included, against TRL's SFTTrainer on the same tokens and masks (D3)."""

import jax
import numpy as np
import pytest

from mixtral_jax.data.rows.batch import Batch
from mixtral_jax.train.objective import RouterConfig, next_token
from mixtral_jax.train.step import loss_and_gradients
from tests.parity.hf_models import build, gradients, ours
from tests.tiny import largest_relative_difference, split

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
LENGTHS, PROMPTS, T = (9, 14, 6), (3, 8, 1), 16


def test_the_loss_and_its_gradients_are_those_of_trl(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    pair = build(tmp_path / "model", num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.05)
    rng = np.random.default_rng(0)
    records = [
        {
            "input_ids": rng.integers(3, 97, n).tolist(),
            "completion_mask": [0] * p + [1] * (n - p),
        }
        for n, p in zip(LENGTHS, PROMPTS, strict=True)
    ]  # fmt: skip
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2", eos_token="w1", unk_token="w0")
    args = SFTConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, max_length=T + 1, completion_only_loss=True,
        per_device_train_batch_size=3, activation_checkpointing=False, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(pair.hf, args=args, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    theirs = trainer.compute_loss(trainer.model, inputs)
    trainer.model.zero_grad()
    theirs.backward()

    batch = _packed(records)
    objective = next_token(
        RouterConfig(balance_loss="hf_pooled", router_aux_loss_coef=0.05, router_z_loss_coef=0),
        pair.config,
        entropy=True,
        skip_masked=True,
    )
    params, merge = split(ours(pair))
    loss, parts, grads = jax.jit(lambda p: loss_and_gradients(objective, merge, p, None, batch))(params)
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    logged = trainer._metrics["train"] or trainer._metrics["eval"]
    assert float(parts.entropy) == pytest.approx(logged["entropy"][0], rel=1e-4)
    assert float(parts.accuracy) == pytest.approx(logged["mean_token_accuracy"][0], rel=1e-4)
    assert largest_relative_difference(grads, gradients(pair.hf, tmp_path / "gradients")) < 1e-4


def _packed(records) -> Batch:
    """All three chats: two in one row, one in another."""
    rows = [np.zeros((1, 2, 2 * T), t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)]
    for record, (row, at, segment) in zip(records, ((0, 0, 1), (0, 9, 2), (1, 0, 1)), strict=True):
        ids, n = record["input_ids"], len(record["input_ids"])
        # The last token predicts nothing, but is routed, in TRL too: it counts in the balance loss.
        values = (ids, [*ids[1:], 0], [*record["completion_mask"][1:], 0], [segment] * n, range(n))
        for field, value in zip(rows, values, strict=True):
            field[0, row, at : at + n] = list(value)
    return Batch(*rows)
