"""A whole DPO step, balance loss included, against TRL's DPOTrainer on the same tokens: loss, gradients, two steps."""

import jax
import numpy as np
import pytest

from mixtral_jax.data.rows.batch import Batch, PairBatch
from mixtral_jax.data.rows.row import pair_row
from mixtral_jax.train.objective import RouterConfig
from mixtral_jax.train.optimizer import OptimizerConfig, make_optimizer
from mixtral_jax.train.preference.config import DpoConfig
from mixtral_jax.train.preference.objective import make_sequence_logps, preference
from mixtral_jax.train.state import create_state
from mixtral_jax.train.step import loss_and_gradients, make_train_step
from tests.parity.hf_models import build, gradients, ours
from tests.tiny import largest_relative_difference, split

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
LENGTHS, T = ((5, 4, 7), (9, 6, 2), (1, 3, 3)), 40  # of prompt, chosen and rejected
SHAPE = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.05)
# eps so large that a gradient which is nearly 0 does not become a full step in the direction of its rounding error
ADAMW = dict(learning_rate=1e-2, adam_epsilon=1e-3, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant")


def words(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("policy") / "model", **SHAPE)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return build(tmp_path_factory.mktemp("reference") / "model", seed=1, **SHAPE)


def trainer_of(pair, reference, directory, loss_type):
    """TRL's trainer on three pairs of random words, all of them in every step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    rng = np.random.default_rng(0)
    records = [
        dict(zip(("prompt", "chosen", "rejected"), (words(rng.integers(3, 97, n)) + " " for n in lengths), strict=True))
        for lengths in LENGTHS
    ]
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w2", eos_token="w1", unk_token="w0")
    args = DPOConfig(
        output_dir=str(directory), report_to=[], use_cpu=True, max_length=T, beta=0.3, loss_type=loss_type,
        per_device_train_batch_size=len(LENGTHS), bf16=False, gradient_checkpointing=False, max_steps=2,
        logging_steps=1, save_strategy="no", disable_tqdm=True, **ADAMW,
    )  # fmt: skip
    return DPOTrainer(
        pair.hf, reference.hf, args=args, train_dataset=Dataset.from_list(records), processing_class=tokenizer
    )


def rows_of(examples):
    """One pair to a row, in tokens as TRL has them. The last token predicts nothing, but is routed, in TRL too."""
    rows = []
    for example in examples:
        fields = [np.zeros(T, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)]
        at = 0
        for segment, side in enumerate(("chosen_ids", "rejected_ids"), 1):
            ids, prompt = example["prompt_ids"] + example[side], len(example["prompt_ids"])
            n = len(ids)
            learned = [float(i + 1 >= prompt and i + 1 < n) for i in range(n)]
            values = (ids, [*ids[1:], 0], learned, [segment] * n, range(n))
            for field, value in zip(fields, values, strict=True):
                field[at : at + n] = list(value)
            at += n
        rows.append(pair_row(Batch(*fields), pairs=1))
    return PairBatch(*(np.stack(column)[None] for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("loss_type", [("sigmoid",), ("ipo",), ("sigmoid", "sft")], ids="+".join)
def test_a_step_is_that_of_the_trainer(pair, reference, tmp_path, loss_type):
    trainer = trainer_of(pair, reference, tmp_path / "trl", list(loss_type))
    examples = [trainer.train_dataset[i] for i in range(len(LENGTHS))]
    assert examples[0]["chosen_ids"][-1] == 1  # EOS is learned
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    trainer.model.zero_grad()
    theirs.backward()
    want = gradients(pair.hf, tmp_path / "gradients")
    trainer.model.zero_grad()

    batch = rows_of(examples)
    reference_params, merge_reference = split(ours(reference))
    ask = make_sequence_logps(lambda p: merge_reference(p, None), None)
    batch = batch._replace(ref_logps=np.asarray(ask(reference_params, batch)))
    router = RouterConfig(balance_loss="hf_pooled", router_aux_loss_coef=0.05, router_z_loss_coef=0)
    objective = preference(DpoConfig(beta=0.3, loss_type=loss_type), router, pair.config)
    params, merge = split(ours(pair))
    loss, parts, grads = jax.jit(lambda p: loss_and_gradients(objective, merge, p, None, batch))(params)
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    assert largest_relative_difference(grads, want) < 1e-4
    logged = trainer._metrics["train"] or trainer._metrics["eval"]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert float(parts.rewards[name]) == pytest.approx(logged[name][0], rel=1e-4, abs=1e-5), name


def test_a_second_step_starts_where_the_trainers_does(pair, reference, tmp_path):
    """Two updates by each library's own loop: the losses of both steps."""
    kept = {name: p.detach().clone() for name, p in pair.hf.named_parameters()}
    trainer = trainer_of(pair, reference, tmp_path / "trl", ["sigmoid"])
    batch = rows_of([trainer.train_dataset[i] for i in range(len(LENGTHS))])
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    pair.hf.load_state_dict(kept)

    reference_params, merge_reference = split(ours(reference))
    ask = make_sequence_logps(lambda p: merge_reference(p, None), None)
    batch = batch._replace(ref_logps=np.asarray(ask(reference_params, batch)))
    router = RouterConfig(balance_loss="hf_pooled", router_aux_loss_coef=0.05, router_z_loss_coef=0)
    params, merge = split(ours(pair))
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=1e-2, b1=0.9, b2=0.999, eps=1e-3, weight_decay=0.0, max_grad_norm=1.0, warmup_steps=0,
            schedule="constant",
        ),
        2,
    )  # fmt: skip
    step = make_train_step(preference(DpoConfig(beta=0.3), router, pair.config), optimizer, merge)
    state, losses = create_state(jax.tree.map(np.array, params), optimizer), []
    for _ in range(2):
        state, report = step(state, None, batch)
        losses.append(float(report.scalars["train/loss"]))
    assert losses[1] < losses[0] - 0.01
    assert losses == pytest.approx(theirs, rel=1e-4)
