"""How a run ends where its files refuse, or where it was killed behind its last save."""

import errno
import json
import math
import os
import shutil

import numpy as np
import pytest

from mixtral_jax.data import loader
from mixtral_jax.train import build, optimizer
from mixtral_jax.train import trainer as training
from mixtral_jax.train.checkpoints import checkpointer
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import StorageError, UserError
from mixtral_jax.train.hooks import sample, sinks
from mixtral_jax.train.run import directory
from tests.tiny import metrics_of, write_run_file


class Killed(BaseException):
    """As kill -9, to this process alone."""


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """(its directory, train) of a run of four steps with a checkpoint after two."""
    monkeypatch.setattr(training, "make_mesh", lambda config: None)

    def run_of(**changes):
        every = {"steps": 4, "log": {"every": 1, "tensorboard": False}, "checkpoint": {"every": 2, "keep_last": 1}}
        file = write_run_file(tmp_path, **every | changes)
        return tmp_path / "runs" / "run", lambda: training.run(load_config(file).config)

    return run_of


def test_a_status_that_is_a_directory_is_refused_before_anything_is_trained(run_of):
    place, train = run_of()
    (place / "STATUS").mkdir(parents=True)
    with pytest.raises(UserError, match="STATUS is a directory"):
        train()
    assert not (place / "checkpoints").exists()


@pytest.mark.parametrize("asked", ["SIGTERM", None])
def test_a_status_that_cannot_be_written_makes_no_other_end_of_the_run(run_of, monkeypatch, capsys, asked):
    """Exit 2 would be final. Of a run that is done, the same command again says so in STATUS."""
    place, train = run_of()
    write, refused = directory.replace_or_overwrite, []

    def refusing(file, text):
        if file.name == "STATUS" and refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return write(file, text)

    def requested(self, step):
        if step == 3:
            refused.append(step)
            return asked
        return None

    monkeypatch.setattr(directory, "replace_or_overwrite", refusing)
    monkeypatch.setattr(training.Interrupts, "requested", requested)
    if asked:
        assert train() == 75
        assert "STATUS could not be written: Permission denied" in capsys.readouterr().out
        assert (place / "checkpoints" / "3").is_dir()
        return
    with pytest.raises(StorageError, match=r"4 steps are done.*STATUS could not be written: Permission denied"):
        train()
    refused.clear()
    assert train() == 0
    assert json.loads((place / "STATUS").read_text())["state"] == "done"
    assert "exit 0: nothing left to do" in (place / "report.html").read_text()  # the last line too


def test_killed_behind_its_last_save_a_run_still_names_its_best(run_of, monkeypatch):
    place, train = run_of(eval={"every": 2}, early_stopping={"patience": 5})
    prune = checkpointer.Checkpointer._prune

    def killed(self, newest, best):
        if newest == 4:
            raise Killed
        return prune(self, newest, best)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer.Checkpointer, "_prune", killed)
        with pytest.raises(Killed):
            train()
    checkpoints = place / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} >= {"2", "4"}
    assert train() == 0
    assert os.readlink(checkpoints / "best") == "4"


def test_killed_while_it_samples_a_run_samples_again(run_of, monkeypatch):
    place, train = run_of(sample={"every": 2, "prompts": ["the"], "max_new_tokens": 2})

    def killed(self, moment):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sample.Sample, "run", killed)
        for _ in range(2):
            with pytest.raises(Killed):
                train()
    assert train() == 0
    assert sorted(p.name for p in (place / "samples").iterdir()) == ["2.jsonl", "4.jsonl"]


def losses(place, key="train/loss"):
    return {line["step"]: line[key] for line in metrics_of(place) if key in line}


def full_at(monkeypatch, step, key):
    """The line of this step that has this key finds no room in metrics.jsonl; there is some a moment later."""
    write, refused = sinks.JsonLines.write, []

    def refusing(self, at, metrics):
        write(self, at, metrics)
        if at == step and key in metrics and not refused:
            refused.append(at)
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(sinks.JsonLines, "write", refusing)


def test_no_room_for_the_line_of_a_step_that_is_not_finite_saves_no_state_that_is_not(run_of, monkeypatch):
    place, train = run_of(checkpoint={"every": 2, "keep_last": 1})
    with monkeypatch.context() as patch:
        full_at(patch, 3, "train/loss")
        spoil(patch, 2 * 8)
        assert train() == 3
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["2"]
    assert math.isnan(losses(place)[3])
    assert train() == 0


def test_a_state_that_is_not_finite_is_not_saved_for_the_asking(run_of, monkeypatch):
    place, _ = run_of()
    spoil(monkeypatch, 2 * 8)
    with training.Trainer(load_config(place.parent.parent / "run.yaml").config, quiet=True) as trainer:
        list(trainer.steps())
        with pytest.raises(UserError, match="nothing to save: step 3 has loss nan"):
            trainer.save()
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("what", ["log", "data"])
def test_what_fails_ahead_of_an_evaluation_leaves_it_to_the_next_start(run_of, monkeypatch, what):
    """The step is saved; its line and its evaluation are not lost."""
    place, train = run_of(eval={"every": 2}, early_stopping={"patience": 5})
    with monkeypatch.context() as patch:
        if what == "log":
            full_at(patch, 2, "train/loss")
        else:
            spoil(patch, 2 * 8, OSError(errno.EIO, "Input/output error", "rows"))
        with pytest.raises(StorageError, match="checkpoint 2 stands"):
            train()
    assert train() == 0
    assert list(losses(place)) == [1, 2, 3, 4] and list(losses(place, "eval/loss")) == [2, 4]


def test_a_step_that_is_skipped_has_one_line(run_of, monkeypatch):
    place, train = run_of(optimizer={"skip_spikes": 3.0}, log={"every": 2, "tensorboard": False})
    monkeypatch.setattr(
        optimizer, "_is_spike", lambda _, state, norm: (state.norm_count == 1) | (state.norm_count == 2)
    )
    assert train() == 0
    lines = [line for line in metrics_of(place) if "train/loss" in line]
    assert [(line["step"], line["train/skipped"]) for line in lines] == [(2, 1), (3, 1), (4, 0)]
    assert lines[0]["train/tokens"] < lines[1]["train/tokens"] < lines[2]["train/tokens"]


def test_steps_that_a_roll_back_takes_back_are_lost(run_of, monkeypatch):
    place, train = run_of(on_nonfinite="rollback")
    spoil(monkeypatch, 3 * 8)
    assert train() == 0
    (attempt,) = [json.loads(line) for line in (place / "attempts" / "goodput.jsonl").read_text().splitlines()]
    seconds = json.loads((place / "STATUS").read_text())["seconds"]
    assert attempt["undone"] == 2
    assert seconds["lost"] == pytest.approx(attempt["seconds"]["step"] * 2 / 6, abs=2e-3)
    assert seconds["step"] == pytest.approx(attempt["seconds"]["step"] * 4 / 6, abs=2e-3)


def test_bytes_that_are_no_text_keep_no_run_from_going_on(run_of):
    """What a machine that lost its power has left in STATUS and at the end of metrics.jsonl."""
    place, train = run_of(checkpoint={"every": 2, "keep_last": 2})
    assert train() == 0
    shutil.rmtree(place / "checkpoints" / "4")
    for name in ("STATUS", "metrics.jsonl", "moe.jsonl"):
        with (place / name).open("ab" if name != "STATUS" else "wb") as file:
            file.write(b"\xff\xfe\x00" * 9)
    assert train() == 0
    assert json.loads((place / "STATUS").read_text())["state"] == "done" and list(losses(place)) == [1, 2, 3, 4]


def spoil(monkeypatch, row, error=None):
    """The batch that begins with a row is not finite, or cannot be read."""

    class Loader(loader.Loader):
        def __init__(self, *args, start_row, **more):
            super().__init__(*args, start_row=start_row, **more)
            self.row = start_row

        def __next__(self):
            batch, first = super().__next__(), self.row
            self.row += 8
            if first == row and error is not None:
                raise error
            return batch._replace(weights=batch.weights * np.float32(np.nan if first == row else 1))

    monkeypatch.setattr(build, "Loader", Loader)
