"""DPO on the step: the loss is train.preference's on numbers of a plain forward, whatever the reference is."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.convert import arrays_identity
from mixtral_jax.data.loader import Loader
from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.rows.batch import PairBatch
from mixtral_jax.moe.balance import balance_loss
from mixtral_jax.train import build
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.base import base_weights
from mixtral_jax.train.commands import evaluate
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.feed import make_put
from mixtral_jax.train.objective import RouterConfig, token_sums
from mixtral_jax.train.preference import losses as preference
from mixtral_jax.train.preference import references
from mixtral_jax.train.preference.objective import make_sequence_logps
from mixtral_jax.train.preference.objective import preference as preference_objective
from mixtral_jax.train.step import loss_and_gradients, make_eval_step
from mixtral_jax.train.weights import abstract_params
from tests.documented import undocumented
from tests.tiny import largest_relative_difference, metrics_of, split, tiny_config, tiny_model
from tests.tuning import write_tuning_file

OFF = RouterConfig(router_aux_loss_coef=0, router_z_loss_coef=0)
CONFIG = tiny_config()


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> PairBatch:
    """Eight rows of up to two pairs, some of one, from files, with numbers of a reference."""
    file = write_tuning_file(tmp_path_factory.mktemp("pairs"), "dpo", data={"pairs_per_row": 2})
    data = load_config(file).config.data
    loader = Loader(prepare(data, 128, 0), global_batch_size=8)
    made = next(loader)
    loader.close()
    mask = made.mask.copy()
    mask[0, 1, 1] = 0  # a row with one pair, whatever the packing made
    return made._replace(ref_logps=reference_numbers(made), mask=mask)


def reference_numbers(batch):
    params, merge = split(tiny_model(CONFIG, seed=1))
    return np.asarray(make_sequence_logps(lambda p: merge(p, None), None)(params, batch))


def plain_logps(model, batch):
    """(pairs, 2, 2): the sum and the count of each completion's log-probabilities, each sequence alone in a row."""
    forward = jax.jit(lambda tokens, segments: jax.nn.log_softmax(model(tokens, None, segments)[0]))
    found = []
    for a, b in np.ndindex(batch.tokens.shape[:2]):
        for k in np.flatnonzero(batch.mask[a, b]):
            sides = []
            for segment in (2 * k + 1, 2 * k + 2):
                own = np.flatnonzero(batch.segment_ids[a, b] == segment)
                row = np.zeros((2, 1, batch.tokens.shape[-1]), np.int32)
                row[0, 0, : len(own)], row[1, 0, : len(own)] = batch.tokens[a, b, own], 1
                logps_TV, targets = np.asarray(forward(*row)), batch.targets[a, b, own]
                learned = batch.completion[a, b, own] > 0
                logps_T = logps_TV[np.arange(len(own)), targets]
                sides.append((logps_T[learned].sum(), learned.sum()))
            found.append(sides)
    return np.array(found)


@pytest.fixture(scope="module")
def plain(batch):
    return plain_logps(tiny_model(CONFIG), batch)


def objective(router=OFF, **options):
    return preference_objective(preference.DpoConfig(**options), router, CONFIG)


def measure(batch, seed=0, router=OFF, **options):
    params, merge = split(tiny_model(CONFIG, seed=seed))
    chosen = objective(router, **options)
    return jax.jit(lambda p, b: loss_and_gradients(chosen, merge, p, None, b))(params, batch)


def forward(batch, router=OFF, **options):
    """(loss, parts) without gradients."""
    params, merge = split(tiny_model(CONFIG))
    chosen, rows = objective(router, **options), jax.tree.map(lambda x: x[0], batch)
    return jax.jit(lambda p, b: chosen.loss(merge(p, None), b, chosen.weight(batch)))(params, rows)


def regroup(batch, micro_batches):
    return PairBatch(*(x.reshape(micro_batches, -1, *x.shape[2:]) for x in batch))


def test_rows_hold_whole_pairs_and_count_their_completions(batch):
    for a, b in np.ndindex(batch.tokens.shape[:2]):
        for k, side in np.ndindex(2, 2):
            own = batch.segment_ids[a, b] == 2 * k + side + 1
            completion = batch.completion[a, b, own]
            assert completion.max(initial=0) == batch.lengths[a, b, k, side]
            learned = completion[completion > 0]
            assert learned.tolist() == list(range(1, len(learned) + 1))
            if own.any():
                assert batch.targets[a, b, own][completion > 0][-1] == 1  # </s> of the byte tokenizer is learned
    assert (batch.lengths[..., 1, 0] > 0).any()  # two pairs share a row


def test_sequence_logps_are_those_of_each_sequence_alone(batch, plain):
    params, merge = split(tiny_model(CONFIG))
    found = make_sequence_logps(lambda p: merge(p, None), None)(params, batch)
    pairs = np.asarray(found)[batch.mask > 0]
    np.testing.assert_allclose(pairs, plain[..., 0], rtol=2e-5)


@pytest.mark.parametrize("loss_type", [("ipo",), ("sigmoid", "sft")])
def test_the_loss_of_a_step_is_that_of_the_preference_functions_on_a_plain_forward(batch, plain, loss_type):
    ref = batch.ref_logps[batch.mask > 0]
    expected = preference.loss(
        loss_type,
        policy_chosen=jnp.asarray(plain[:, 0, 0]), policy_rejected=jnp.asarray(plain[:, 1, 0]),
        ref_chosen=jnp.asarray(ref[:, 0]), ref_rejected=jnp.asarray(ref[:, 1]),
        chosen_lengths=jnp.asarray(plain[:, 0, 1], jnp.int32), rejected_lengths=jnp.asarray(plain[:, 1, 1], jnp.int32),
    )  # fmt: skip
    loss, parts = forward(batch, loss_type=loss_type)
    assert float(loss) == pytest.approx(float(expected), rel=2e-5)
    scalars = {name: float(value) for name, value in objective().report(parts).scalars.items()}
    reward = 0.1 * (plain[..., 0] - ref)
    assert scalars["rewards/accuracies"] == pytest.approx(np.mean(reward[:, 0] > reward[:, 1]))
    assert scalars["rewards/margins"] == pytest.approx(np.mean(reward[:, 0] - reward[:, 1]), rel=1e-3, abs=1e-4)
    assert scalars["logps/chosen"] == pytest.approx(plain[:, 0, 0].mean(), rel=1e-5)
    assert scalars["train/pairs"] == len(plain)


def test_the_gradient_is_that_of_a_plain_forward(batch):
    params, merge = split(tiny_model(CONFIG))
    rows = jax.tree.map(lambda x: x[0], batch)

    def plain_loss(params):
        logits = merge(params, None)(rows.tokens, rows.positions, rows.segment_ids)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(rows.targets)[..., None], -1)[..., 0]
        total = 0.0
        for b, k in zip(*np.nonzero(rows.mask), strict=True):
            inside = [(rows.segment_ids[b] == 2 * k + side) & (rows.completion[b] > 0) for side in (1, 2)]
            ratio = [jnp.sum(logps[b] * m) - r for m, r in zip(inside, rows.ref_logps[b, k], strict=True)]
            total -= jax.nn.log_sigmoid(0.1 * (ratio[0] - ratio[1]))
        return total / rows.mask.sum()

    loss, _, grads = measure(batch)
    expected, expected_grads = jax.jit(jax.value_and_grad(plain_loss))(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert largest_relative_difference(grads, expected_grads) < 2e-4


def test_accumulation_over_unequal_micro_batches_is_one_full_batch(batch):
    loss_type = ("sigmoid", "sft")  # two divisors
    loss, _, grads = measure(batch, loss_type=loss_type)
    loss_4, _, grads_4 = measure(regroup(batch, 4), loss_type=loss_type)
    assert float(loss_4) == pytest.approx(float(loss), rel=1e-5)
    assert largest_relative_difference(grads_4, grads) < 1e-4


def test_the_balance_loss_is_part_of_it(batch):
    rows = jax.tree.map(lambda x: x[0], batch)
    as_text = SimpleNamespace(**rows._asdict(), weights=np.zeros(rows.tokens.shape, np.float32))
    stats = token_sums(tiny_model(CONFIG), as_text)[1]
    without, _ = forward(batch)
    router = RouterConfig(balance_loss="hf_pooled", router_aux_loss_coef=0.5, router_z_loss_coef=0)
    loss, _ = forward(batch, router=router)
    assert float(loss - without) == pytest.approx(0.5 * float(balance_loss(stats, "hf_pooled", 2)), rel=1e-4)


def test_evaluation_adds_up_over_batches(batch):
    params, merge = split(tiny_model(CONFIG))
    step = make_eval_step(objective(), merge)
    loss, parts = forward(batch)
    sums = [step(params, None, jax.tree.map(lambda x, a=a: x[a : a + 1], regroup(batch, 4))) for a in range(4)]
    pairs = sum(float(s.pairs) for s in sums)
    assert pairs == batch.mask.sum()
    assert sum(float(s.loss) for s in sums) / pairs == pytest.approx(float(loss), rel=1e-5)
    accuracy = float(parts.rewards["rewards/accuracies"])
    assert sum(float(s.accuracies) for s in sums) / pairs == pytest.approx(accuracy)


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs a tiny DPO run; returns its training metrics and what it printed."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)

    def start(name, **changes):
        file = write_tuning_file(tmp_path, "dpo", run_name=name, log={"every": 1}, **changes)
        config, provenance = load_config(file)
        assert loop.run(config, provenance) == 0
        return metrics_of(tmp_path / "runs" / name)

    return start


def numbers(lines):
    return [{k: v for k, v in line.items() if k.startswith(("train/", "rewards/", "eval/"))} for line in lines]


def test_precomputed_references_train_as_a_live_one_bit_for_bit_and_are_not_mixed_up(start, tmp_path, monkeypatch):
    live = start("live")
    assert live[-1].keys() >= {"checkpoint/seconds"} and undocumented(live) == set()
    asked = []
    compute = references._compute
    monkeypatch.setattr(references, "_compute", lambda *a: asked.append(a) or compute(*a))
    kept = start("kept", dpo={"reference": "precomputed"})
    assert numbers(kept) == numbers(live)
    evals = [line for line in live if "eval/loss" in line]
    assert {"eval/rewards/accuracies", "eval/answers/rewards/margins"} <= evals[-1].keys()
    assert len(asked) == 2  # training and validation
    config = load_config(tmp_path / "run.yaml").config
    monkeypatch.setattr(evaluate, "make_mesh", lambda config: None)
    measured = evaluate.measure(str(tmp_path / "runs" / "live"), config)  # what training measured last
    assert measured == pytest.approx({k: v for k, v in evals[-1].items() if k.startswith("eval/")}, rel=1e-4, abs=1e-6)
    assert "rewards/accuracies" in evaluate._table(measured, ["answers"])
    abstract = abstract_params(config, None)
    weights, prepared = base_weights(config, abstract), prepare(config.data, config.seq_len, config.seed)
    again = build.numbers_of_reference(config, abstract, prepared, make_put(None, (0, 1)), (0, 1), print)
    assert len(asked) == 2 and len(again) == 2
    other = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-6), weights)
    assert arrays_identity(other) != arrays_identity(weights)
    for meta in (tmp_path / "cache" / "references").glob("*/meta.json"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"weights": "others"}))
    with pytest.raises(UserError, match="reference numbers of another weights"):
        build.numbers_of_reference(config, abstract, prepared, make_put(None, (0, 1)), (0, 1), print)
    made_of = []  # `auto` is another dtype on another machine, which may share the cache
    monkeypatch.setattr(build, "precomputed", lambda sources, ask, made, *_: made_of.append(made))
    for dtype in (jnp.float32, jnp.bfloat16):
        monkeypatch.setattr(build, "compute_dtype", lambda _, dtype=dtype: jnp.dtype(dtype))
        build.numbers_of_reference(config, abstract, prepared, make_put(None, (0, 1)), (0, 1), print)
    assert config.compute.dtype == "auto" and made_of[0] != made_of[1]


def test_the_base_under_adapters_is_the_reference_that_a_frozen_copy_is(start):
    lora = {"rank": 2, "alpha": 8.0}
    base = start("base", lora=lora, dpo={"reference": "lora_base"})
    copy = start("copy", lora=lora, dpo={"reference": "frozen"})
    assert numbers(base) == numbers(copy)
    first = next(line for line in base if "train/loss" in line)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)  # adapters begin as nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo": {"reference": "lora_base"}}, "reference is lora_base, but the run has no LoRA"),
        (
            {"dpo": {"reference": "lora_base"}, "lora": {"rank": 2}, "router": {"update": "train"}},
            "router of that base",
        ),
        ({"dpo": {"loss_type": "aot"}, "micro_batch_size": 2}, "aot sorts the whole batch"),
        ({"data": {"examples": "chat"}}, "stage dpo reads preference"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(write_tuning_file(tmp_path, "dpo", **changes))
