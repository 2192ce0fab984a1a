"""Runs that cannot go on: back to a checkpoint and past bad rows, the same after every kill; and skips without end."""

import errno
import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from mixtral_jax import checkpoint
from mixtral_jax.data import loader
from mixtral_jax.train import build, optimizer
from mixtral_jax.train import checkpoints as training_checkpoints
from mixtral_jax.train import trainer as training
from mixtral_jax.train.checkpoints import patience, saved_steps
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.hooks import JsonLines, ledger
from tests.documented import undocumented
from tests.tiny import metrics_of, write_run_file

ROWS = 8  # of a step
EVERY_STEP = {"log": {"every": 1, "tensorboard": False}, "checkpoint": {"every": 3, "asynchronous": False}}


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    """A Trainer of the tiny run in which the global rows `bad` have weights that are not finite."""
    monkeypatch.setattr(training, "make_mesh", lambda config: None)

    def trainer_of(place, bad=(), stop_after=None, **changes):
        file = write_run_file(tmp_path / "files", **EVERY_STEP | changes, output_dir=str(tmp_path / place))
        config = load_config(file).config

        class Loader(loader.Loader):
            def __init__(self, *args, start_row, **more):
                super().__init__(*args, start_row=start_row, **more)
                self.row = start_row

            def __next__(self):
                batch, rows = super().__next__(), range(self.row, self.row + ROWS)
                self.row += ROWS
                return batch._replace(weights=batch.weights * np.float32(np.nan)) if set(bad) & set(rows) else batch

        monkeypatch.setattr(build, "Loader", Loader)
        asked = {stop_after: "SIGTERM"}
        monkeypatch.setattr(training.Interrupts, "requested", lambda self, step: asked.get(step))
        return training.Trainer(config, quiet=True)

    return trainer_of


def trained(trainer):
    with trainer:
        seen = [(moment.step, moment.metrics["train/loss"]) for moment in trainer.steps()]
    return seen, trainer.outcome


def losses(place):
    return {line["step"]: line["train/loss"] for line in metrics_of(place) if "train/loss" in line}


def dataset(place, step):
    return checkpoint.read_item(epath.Path(place / "checkpoints" / str(step)), "dataset")


def test_a_run_goes_back_and_past_the_bad_rows(trainer_of, tmp_path):
    """Steps 4 and 5 are done twice: the second time with the rows behind those of step 5, which were bad."""
    place, rollback = tmp_path / "whole" / "run", {"on_nonfinite": "rollback"}
    seen, outcome = trained(trainer_of("whole", [4 * ROWS + 3], **rollback))
    assert outcome.exit_code == 0 and outcome.step == 8
    assert [step for step, _ in seen] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert all(math.isfinite(loss) for _, loss in seen)
    lines = metrics_of(place)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert undocumented(lines) == set()
    (note,) = [line for line in lines if "rollback/step" in line]
    assert (note["step"], note["rollback/step"], note["rollback/next_row"]) == (4, 5, 40)
    assert math.isnan(note["rollback/loss"])
    passed = [{"after_step": 3, "bad_step": 5, "next_row": 40}]
    assert "back to checkpoint 3, then row 40" in (place / "logs" / "process_0.log").read_text()
    assert dataset(place, 8)["passed"] == passed and dataset(place, 8)["next_row"] == 40 + 5 * ROWS

    # killed behind the next checkpoint, killed before it, stopped and saved ahead of it: the same losses to the bit
    for name, stop in (("behind", 7), ("before", 5), ("ahead", 4)):
        own = tmp_path / name / "run"
        trained(trainer_of(name, [35], stop_after=stop, **rollback))
        if stop == 5:  # kill -9 saves nothing
            (own / "checkpoints" / "5").rename(own / "gone")
        _, outcome = trained(trainer_of(name, [35], **rollback))
        assert outcome.exit_code == 0
        assert losses(own) == losses(place)
        assert dataset(own, 8)["passed"] == passed


def test_an_accelerator_whose_flags_are_read_late_does_the_same(trainer_of, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "jax", SimpleNamespace(default_backend=lambda: "tpu", device_get=jax.device_get))
    seen, outcome = trained(trainer_of("late", [35], on_nonfinite="rollback"))
    assert outcome.exit_code == 0 and [step for step, _ in seen][-5:] == [4, 5, 6, 7, 8]
    assert dataset(tmp_path / "late" / "run", 8)["passed"] == [{"after_step": 3, "bad_step": 5, "next_row": 40}]
    monkeypatch.setattr(optimizer, "_is_spike", lambda _, state, norm: state.norm_count >= 2)
    trainer = trainer_of("skips", optimizer={"skip_spikes": 3.0, "max_skips": 3}, log={"every": 100})
    _, outcome = trained(trainer)
    assert (outcome.step, outcome.exit_code) == (5, 3) and int(trainer._state.step) == 5


def test_it_goes_back_no_more_often_than_it_may(trainer_of, tmp_path):
    bad = range(4 * ROWS, 400)
    _, outcome = trained(trainer_of("often", bad, on_nonfinite="rollback", max_rollbacks=2))
    assert (outcome.state, outcome.step, outcome.exit_code) == ("diverged", 3, 3)
    assert "the run went back 2 times already (max_rollbacks); checkpoint 3 stands" in outcome.reason


def test_without_a_checkpoint_or_the_wish_it_ends(trainer_of, tmp_path):
    _, outcome = trained(trainer_of("early", [8], on_nonfinite="rollback"))
    assert outcome.exit_code == 3 and "nothing to go back to; there is no checkpoint" in outcome.reason
    _, outcome = trained(trainer_of("stop", [35]))
    assert (outcome.step, outcome.exit_code) == (4, 3)
    assert outcome.reason == ("step 5 has loss nan and gradient norm nan; no update was made; checkpoint 3 stands")


def test_skips_without_end_end_the_run_and_a_resume_keeps_their_count(trainer_of, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "_is_spike", lambda _, state, norm: state.norm_count >= 2)
    changes = {"optimizer": {"skip_spikes": 3.0, "max_skips": 4}, "on_nonfinite": "rollback"}
    _, outcome = trained(trainer_of("skips", stop_after=4, **changes))
    assert outcome.exit_code == 75
    assert dataset(tmp_path / "skips" / "run", 4)["skips"] == 2
    _, outcome = trained(trainer_of("skips", **changes))
    assert (outcome.state, outcome.step, outcome.exit_code) == ("diverged", 6, 3)
    assert "the last 4 updates were skipped (optimizer.max_skips)" in outcome.reason
    assert "checkpoint 4 stands" in outcome.reason


@pytest.fixture
def full_at(monkeypatch):
    """full_at(step): metrics.jsonl takes no line of that step but those of `rollback`."""
    original = JsonLines.write

    def full_at(full):
        def write(self, step, metrics):
            original(self, step, metrics)
            if step == full and self._path.name == "metrics.jsonl" and "train/loss" in metrics:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(JsonLines, "write", write)

    return full_at


@pytest.mark.parametrize("wish", ["stop", "rollback"])
def test_a_full_disk_at_the_bad_step_poisons_no_checkpoint(trainer_of, tmp_path, full_at, wish):
    """Its state was saved as a good one with the position behind it, as nobody heard that the step was bad."""
    full_at(5)
    _, outcome = trained(trainer_of(wish, [35], on_nonfinite=wish, log={"every": 100}))
    saved = saved_steps(tmp_path / wish / "run" / "checkpoints")
    assert (outcome.exit_code, saved) == ((3, [3]) if wish == "stop" else (0, [6, 8]))


def test_a_full_disk_at_a_skipped_step_costs_no_count(trainer_of, tmp_path, full_at, monkeypatch):
    monkeypatch.setattr(optimizer, "_is_spike", lambda _, state, norm: state.norm_count >= 2)
    full_at(3)
    changes = {"optimizer": {"skip_spikes": 3.0, "max_skips": 4}, "log": {"every": 100}}
    with pytest.raises(training.StorageError, match="checkpoint 3 stands"):
        trained(trainer_of("skips", **changes))
    full_at(6)
    _, outcome = trained(trainer_of("skips", **changes))
    assert (outcome.step, outcome.exit_code) == (6, 3)
    kept = dataset(tmp_path / "skips" / "run", 3)
    lines = metrics_of(tmp_path / "skips" / "run")
    tokens = {line["step"]: line["train/tokens"] for line in lines if "train/tokens" in line}
    assert kept["skips"] == 1 and kept["tokens"] == tokens[3]


def test_a_skipped_step_has_one_line_of_each_number(trainer_of, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "_is_spike", lambda _, state, norm: state.norm_count >= 2)
    trained(trainer_of("once", optimizer={"skip_spikes": 3.0, "max_skips": 4}))
    lines = metrics_of(tmp_path / "once" / "run")
    said = [(line["step"], key) for line in lines for key in line.keys() - {"step", "time", "attempt"}]
    assert len(said) == len(set(said)) and (3, "perf/step_seconds") in said


def test_an_evaluation_behind_a_line_that_was_refused_is_made_up_for(trainer_of, tmp_path, full_at):
    full_at(4)
    changes = {"eval": {"every": 4}, "log": {"every": 1}}
    with pytest.raises(training.StorageError, match="checkpoint 4 stands"):
        trained(trainer_of("owed", **changes))
    _, outcome = trained(trainer_of("owed", **changes))
    assert outcome.exit_code == 0
    assert [line["step"] for line in metrics_of(tmp_path / "owed" / "run") if "eval/loss" in line] == [4, 8]


def test_a_checkpoint_that_does_not_answer_is_asked_again(trainer_of, tmp_path, monkeypatch):
    refusals, restore = [OSError(errno.EIO, "Input/output error")], training_checkpoints.restore_state

    def refused_once(*args):
        if refusals:
            raise refusals.pop()
        return restore(*args)

    monkeypatch.setattr(training_checkpoints, "restore_state", refused_once)
    monkeypatch.setattr(patience, "PAUSES", (0.001,))
    _, outcome = trained(trainer_of("again", [35], on_nonfinite="rollback"))
    assert outcome.exit_code == 0 and not refusals
