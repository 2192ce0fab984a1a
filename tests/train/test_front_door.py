"""The trainer as notebooks use it: steps, history, evaluation, saving, looking at batches and at the model."""

import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.train import trainer as training
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.feed import Feed
from mixtral_jax.train.hooks.ledger import Ledger
from tests.tiny import write_run_file


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A trainer of the tiny run on one device; closed at the end."""
    monkeypatch.setattr(training, "make_mesh", lambda config: None)
    made = []

    def make(*overrides, **changes):
        changes = {"log": {"every": 1}, "checkpoint": {"every": None}, **changes}
        config = load_config(write_run_file(tmp_path, **changes), overrides).config
        made.append(mj.Trainer(config, quiet=True))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


def losses(trainer):
    return [line["train/loss"] for line in trainer.history if "train/loss" in line]


def test_steps_are_counted_and_remembered(make, capsys):
    with make() as trainer:
        seen = [(moment.step, moment.metrics["train/loss"]) for moment in trainer.steps()]
    assert [step for step, _ in seen] == list(range(1, 9)) and trainer.step == 8
    assert [loss for _, loss in seen] == losses(trainer)
    assert trainer.outcome.state == "done" and trainer.outcome.exit_code == 0
    assert list(trainer.steps()) == []
    assert capsys.readouterr().out == ""  # quiet


def test_a_loop_that_was_left_goes_on_where_it_was(make):
    whole = make("run_name=whole")
    list(whole.steps())
    parts = make("run_name=parts")
    for moment in parts.steps():
        if moment.step == 3:
            break
    evaluated = parts.evaluate()
    assert np.isfinite(evaluated["eval/loss"]) and parts.outcome is None
    assert [moment.step for moment in parts.steps()] == [4, 5, 6, 7, 8]
    assert losses(parts) == losses(whole)


def test_a_saved_step_is_resumed_bit_for_bit(make):
    whole = make("run_name=whole")
    list(whole.steps())
    first = make()
    list(itertools.islice(first.steps(), 3))
    path = first.save()
    assert path.name == "3" and json.loads((path / "meta" / "data.json").read_text())["step"] == 3
    first.close()
    second = make()
    assert second.step == 3
    list(second.steps())
    assert losses(second) == losses(whole)


def test_batches_are_those_of_the_next_steps_and_looking_takes_none(make):
    trainer = make()
    first = next(trainer.batches)
    assert first.tokens.shape == (1, 8, 32) and isinstance(first.tokens, np.ndarray)
    np.testing.assert_array_equal(next(trainer.batches).tokens, first.tokens)
    upcoming = [batch.tokens for batch in itertools.islice(trainer.batches, 3)]
    list(itertools.islice(trainer.steps(), 2))
    np.testing.assert_array_equal(next(trainer.batches).tokens, upcoming[2])
    whole = make("run_name=whole")
    list(whole.steps())
    list(trainer.steps())
    assert losses(trainer) == losses(whole)


def test_the_model_is_the_one_that_the_last_step_left(make):
    trainer = make()
    tokens = jnp.asarray(next(trainer.batches).tokens[0, :2])
    before = trainer.model(tokens)
    list(itertools.islice(trainer.steps(), 2))
    after = trainer.model(tokens)
    assert before.shape == after.shape and not np.allclose(before, after)
    saved = mj.load(trainer.save())
    np.testing.assert_array_equal(saved(tokens), after)


def test_a_finished_run_can_be_asked_but_has_no_steps_left(make):
    done = make()
    list(done.steps())
    wanted = done.evaluate()
    with done.run.metrics.open("a") as file:
        file.write('{"step": 9}\n')  # of a process that has made more of the run since then
    seen = json.loads((done.run.path / "STATUS").read_text())["data"]
    again = make()
    assert again.outcome.reason.startswith("nothing left to do: 8 of 8 steps are done")
    assert list(again.steps()) == [] and again.evaluate() == wanted
    status = json.loads((again.run.path / "STATUS").read_text())
    assert status["state"] == "done" and status["data"] == seen != {}
    assert again.history[-1] == {"step": 9}


def test_a_run_on_a_mesh(make, monkeypatch):
    monkeypatch.undo()
    trainer = make("mesh={data: 2, fsdp: 2, expert: 2}")
    moments = list(itertools.islice(trainer.steps(), 2))
    assert trainer.mesh.shape["expert"] == 2 and moments[-1].step == 2
    assert jax.sharding.get_abstract_mesh().empty  # the loop's body runs outside of it
    with jax.set_mesh(trainer.mesh):
        assert trainer.model(jnp.zeros((8, 32), jnp.int32)).shape == (8, 32, 320)


def test_a_save_under_way_is_waited_for(make, tmp_path):
    with make(checkpoint={"every": 2}) as trainer:
        list(itertools.islice(trainer.steps(), 2))
    assert (tmp_path / "runs/run/checkpoints/2/meta").is_dir()


def test_a_save_that_failed_can_be_tried_again_and_no_whole_one_is_lost(make, monkeypatch):
    trainer = make()
    list(itertools.islice(trainer.steps(), 3))
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.PendingSave, "result", full_disk)
        with pytest.raises(UserError, match="No space left"):
            trainer.save()
    assert (trainer.save() / "meta").is_dir()
    trainer.close()
    again = make()
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.PendingSave, "result", full_disk)
        assert (again.save() / "meta").is_dir()  # the checkpoint that it began from is whole


def full_disk(pending, result=checkpoint.PendingSave.result):
    """What a file system that is full leaves: nothing under the final name."""
    result(pending)
    pending._path.rmtree()
    raise OSError(28, "No space left on device")


def test_a_last_save_that_failed_is_made_up_for_and_no_step_follows(make, monkeypatch):
    trainer = make()
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.PendingSave, "result", full_disk)
        with pytest.raises(UserError, match="No space left"):
            list(trainer.steps())
    assert list(trainer.steps()) == [] and trainer.step == 8
    assert trainer.outcome.state == "done" and len(losses(trainer)) == 8


def test_a_cell_that_is_interrupted_loses_no_step(make, monkeypatch):
    whole = make("run_name=whole")
    list(whole.steps())
    trainer = make()
    with monkeypatch.context() as interrupted:
        for place, name in ((Ledger, "follow"), (Feed, "__next__")):
            steps = trainer.steps()
            next(steps)
            interrupted.setattr(place, name, lambda *_: raise_(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                next(steps)
            interrupted.undo()
            interrupted.setattr(training, "make_mesh", lambda config: None)
            assert trainer.step == int(trainer._state.step)
    list(trainer.steps())
    assert trainer.step == 8 == int(trainer._state.step)
    np.testing.assert_array_equal(trainer.model(np.arange(8)[None]), whole.model(np.arange(8)[None]))


def raise_(error):
    raise error


def test_two_trainers_close_in_any_order(make):
    first, second = make("run_name=first"), make("run_name=second")
    first.close()
    second.close()
    warnings.showwarning("still heard", UserWarning, "file.py", 1)  # a closed log would raise
