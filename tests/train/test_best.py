"""The best checkpoint is kept and named, and a run that no longer gets better ends."""

import json
import math

import jax.numpy as jnp
import pytest

from mixtral_jax.checkpoint.trees import damage
from mixtral_jax.convert import load_config as load_model_config
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.checkpoints import checkpointer as checkpoint
from mixtral_jax.train.checkpoints.best import Best, EarlyStoppingConfig, comparable
from mixtral_jax.train.checkpoints.checkpointer import CheckpointConfig, Checkpointer, best_step, discard, saved_steps
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from tests.tiny import metrics_of
from tests.tuning import write_tuning_file


def judged(config, values, best=None):
    """(step of the best, evaluations before patience ran out) over evaluations at steps 10, 20, ..."""
    best = best or Best(config)
    for step, value in enumerate(values, 1):
        best.judge(10 * step, {config.metric: value})
        if best.exhausted:
            return best.step, step
    return best.step, None


def test_patience_counts_evaluations_without_an_improvement():
    config = EarlyStoppingConfig(patience=2)
    assert judged(config, [3.0, 2.0, 2.5, 1.9, 2.0, 2.1, 1.0]) == (40, 6)
    assert judged(config, [3.0, 2.0, 2.5, 1.9]) == (40, None)
    assert judged(config, [math.nan, math.nan]) == (None, 2)
    assert judged(config, [2.0, math.nan, 1.0, 3.0]) == (30, None)
    assert judged(EarlyStoppingConfig(patience=None), [1.0] * 50) == (10, None)


def test_accuracies_and_margins_go_up():
    for metric in ("eval/rewards/accuracies", "eval/a/rewards/margins", "eval/a/accuracy"):
        assert judged(EarlyStoppingConfig(metric=metric, patience=2), [0.1, 0.3, 0.2, 0.25]) == (20, 4)
    assert judged(EarlyStoppingConfig(metric="eval/a/bits_per_byte", patience=2), [0.1, 0.3, 0.2]) == (10, 3)


def test_a_change_below_min_delta_is_the_best_but_no_reason_to_wait():
    config = EarlyStoppingConfig(patience=3, min_delta=0.1)
    assert judged(config, [1.0, 0.97, 0.94, 0.91]) == (40, 4)
    assert judged(config, [1.0, 0.95, 0.89, 0.88]) == (40, None)  # 0.11 below the first: counted


def test_a_best_checkpoint_that_is_gone_is_named_no_more(tmp_path):
    """Behind a roll back: it was pruned for a better one, which the roll back took back."""
    record = {"metric": "eval/loss", "step": 10, "value": 2.0, "mark": 2.0, "waited": 1}
    saver = Checkpointer(CheckpointConfig(), tmp_path)
    saver.save({"w": jnp.ones(2)}, 20, {}, {"best": record})
    saver.wait()
    found = checkpoint.find(tmp_path, "auto", print)
    assert found is not None and found.meta["best"] == record | {"step": None, "value": None}
    best = Best(EarlyStoppingConfig(), found.meta["best"])
    assert str(best) == ""
    best.judge(30, {"eval/loss": 2.5})
    assert best.step == 30 and best.record["waited"] == 2 and "(2.0000 was not saved)" in str(best)


def test_a_checkpoint_says_where_to_go_on_unless_it_watched_something_else():
    config = EarlyStoppingConfig(patience=3)
    first = Best(config)
    judged(config, [1.0, 2.0, 2.0], first)
    record = json.loads(json.dumps(first.record))
    assert judged(config, [0.999, 2.0, 2.0], Best(config, record)) == (10, None)
    assert judged(config, [2.0], Best(config, record)) == (10, 1)
    other = EarlyStoppingConfig(metric="eval/accuracy", patience=3)
    assert judged(other, [0.1, 0.0, 0.0], Best(other, record)) == (10, None)
    assert Best(None, record).record is None and not str(Best(None, record))


def test_the_best_of_another_measure_is_forgotten_and_of_files_that_moved_not():
    def noted(path="a/val.jsonl", batches=None, beta=0.1, early=True, **source):
        sources = [{"name": "words", "path": path, **source}]
        own = {"seq_len": 32, "data": {"validation": sources}, "eval": {"batches": batches}, "dpo": {"beta": beta}}
        return own | {"early_stopping": {} if early else None}

    said, best = [], {"value": 1.0}
    for before, now in (
        (noted(), noted()), (noted(), noted("b/val.jsonl")), (noted(), noted(batches=1, early=False)),
        (noted(["a/x", "a/y"]), noted(["b/x", "b/y"])), (noted(), noted(split="test")),  # a key that is new
    ):  # fmt: skip
        assert comparable({"best": best, "config": before}, now, said.append) == best
    assert comparable({"config": noted()}, noted(batches=1), said.append) is None and not said
    for before, now in (
        (noted(), noted(batches=1)), (noted(), noted(beta=0.5)), (noted(), noted("a/other.jsonl")),
        (noted(), {**noted(), "seq_len": 64}), (noted(["a/x", "a/y"]), noted(["b/z", "b/y"])),
        (noted("valid/*"), noted("test/*")), (noted(split="a"), noted(split="b")),
    ):  # fmt: skip
        assert comparable({"best": best, "config": before}, now, said.append) is None
    assert len(said) == 7 and "early_stopping begins anew" in said[0]


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs a tiny SFT run that learns nothing: every evaluation is that of the first step. Returns its STATUS."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)

    def start(**changes):
        options = {
            "steps": 9, "eval": {"every": 1}, "checkpoint": {"every": None, "keep_last": 1},
            "optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "constant"},
        }  # fmt: skip
        config, provenance = load_config(write_tuning_file(tmp_path, "sft", **(options | changes)))
        assert loop.run(config, provenance) == 0
        return json.loads((config.run_dir / "STATUS").read_text()), config.run_dir

    return start


def test_a_run_that_no_longer_gets_better_ends_and_keeps_its_best(start):
    status, place = start(early_stopping={"patience": 2})
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 3, 0)
    assert "stopped after step 3 of 9: eval/loss has not improved for 2 evaluations" in status["reason"]
    assert "is that of checkpoint 1" in status["reason"]
    checkpoints = place / "checkpoints"
    assert saved_steps(checkpoints) == [1, 3] and best_step(checkpoints) == 1
    assert load_model_config(checkpoints / "best").hidden_size == 16
    again, _ = start(early_stopping={"patience": 2})
    assert again["reason"].startswith("nothing left to do: eval/loss has not improved for 2 evaluations")
    later, _ = start(early_stopping={"patience": 5})  # two of the five were before the resume
    assert later["step"] == 6 and saved_steps(checkpoints) == [1, 6] and best_step(checkpoints) == 1
    evaluated = [line["step"] for line in metrics_of(place) if "eval/loss" in line]
    assert evaluated == [1, 2, 3, 4, 5, 6]
    last, _ = start(early_stopping=None, steps=8)  # nobody watches any more, but the best stays
    assert last["step"] == 8 and saved_steps(checkpoints) == [1, 8] and best_step(checkpoints) == 1


def test_a_run_to_its_end_names_its_best(start):
    status, place = start(steps=2, early_stopping={"patience": None, "metric": "eval/answers/loss"})
    assert status["reason"].startswith("2 steps are done") and "the best eval/answers/loss, " in status["reason"]
    assert saved_steps(place / "checkpoints") == [1, 2]


def test_going_back_before_the_best_forgets_its_name(start):
    options = {"learning_rate": 0.01, "warmup_steps": 0}
    keep = {"checkpoint": {"every": 1, "keep_last": 9}, "early_stopping": {"patience": None}}
    _, place = start(steps=3, optimizer=options, **keep)
    assert best_step(place / "checkpoints") == 3
    discard(place / "checkpoints", [3])
    assert best_step(place / "checkpoints") is None and saved_steps(place / "checkpoints") == [1, 2]


def test_the_old_best_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    saver = Checkpointer(CheckpointConfig(keep_last=1), tmp_path)

    def save(step, best):
        saver.save({"w": jnp.ones(2)}, step, {}, {}, best)
        saver.wait()

    save(1, 1)
    save(2, 1)
    assert saved_steps(tmp_path) == [1, 2]
    save(3, 3)
    assert saved_steps(tmp_path) == [3] and best_step(tmp_path) == 3
    save(4, 3)
    seen = []
    monkeypatch.setattr(checkpoint, "point_to", lambda d, step: seen.append((saved_steps(d), damage(d / "5"))))
    save(5, 5)
    assert seen[0] == ([3, 4, 5], None)


def test_what_is_not_measured_is_refused(tmp_path):
    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            load_config(write_tuning_file(tmp_path, changes.pop("stage", "sft"), **changes))

    watch = {"eval": {"every": 5}}
    refused(r"metric \(eval/los\) is not measured: known are eval/loss", early_stopping={"metric": "eval/los"}, **watch)
    refused("not measured", early_stopping={"metric": "eval/answers/bits_per_byte"}, **watch)
    refused("eval/answers/rewards/margins", stage="dpo", early_stopping={"metric": "eval/accuracy"}, **watch)
    refused("data.validation is empty", early_stopping={}, data={"validation": []}, **watch)
    refused("eval.every is null", early_stopping={}, eval={"every": None})
