"""`resume_from`: the whole state of another run begins one of another name, and nothing of the other is touched."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.checkpoint import damage
from mixtral_jax.checkpoint.slices import ArrayReader
from mixtral_jax.train import checkpoints
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.config import read_config
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run import check, dry_run
from tests.tiny import metrics_of, write_run_file

TRUNK = {
    "run_name": "trunk", "optimizer": {"schedule": "constant", "warmup_steps": 2, "learning_rate": 0.01},
    "checkpoint": {"every": 2, "keep_last": 9}, "log": {"every": 1, "tensorboard": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of runs, in which `trunk` has done 8 steps at a constant rate."""
    place = tmp_path_factory.mktemp("forks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: None)
        run(place, **TRUNK)
    return place / "runs"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)


def run(place, force=False, **changes):
    """What the run says; it must do all its steps."""
    lines = []
    with loop.Trainer(load_config(write_run_file(place, **changes)).config, quiet=True, force=force) as trainer:
        for _ in trainer.steps():
            pass
        assert trainer.outcome.exit_code == 0, trainer.outcome
    lines = trainer.run.log.read_text()
    return lines


def fork(runs, name, **changes):
    return run(runs.parent, **{**TRUNK, "run_name": name, "resume_from": str(runs / "trunk"), **changes})


def losses(place):
    return {line["step"]: line["train/loss"] for line in metrics_of(place) if "train/loss" in line}


def rates(place):
    return {line["step"]: line["train/learning_rate"] for line in metrics_of(place) if "train/loss" in line}


def arrays(place, step):
    reader = ArrayReader(place / "checkpoints" / str(step))
    return {name: np.asarray(reader.read(name, ())).tobytes() for name in sorted(reader.names)}


def files_of(place):
    return {p.relative_to(place): p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}


def dataset(place, step):
    return json.loads((place / "checkpoints" / str(step) / "dataset" / "data.json").read_text())


def test_a_fork_with_the_same_settings_is_the_trunks_own_continuation(runs):
    before = files_of(runs / "trunk")
    said = fork(runs, "same", resume_from=f"{runs / 'trunk'}@4")
    assert f"this run begins with checkpoint 4 of {runs / 'trunk'}" in said
    assert f"resuming from checkpoint 4 of {runs / 'trunk'} at row 32" in said
    assert losses(runs / "same") == {step: loss for step, loss in losses(runs / "trunk").items() if step > 4}
    assert arrays(runs / "same", 8) == arrays(runs / "trunk", 8)
    assert dataset(runs / "same", 8) == dataset(runs / "trunk", 8)
    assert files_of(runs / "trunk") == before
    env = json.loads((runs / "same" / "env.json").read_text())
    assert env["resumed_from"] == {"run": str(runs / "trunk"), "step": 4}
    meta = json.loads((runs / "same/checkpoints/8/meta/data.json").read_text())
    assert meta["resumed_from"] == env["resumed_from"]


def test_five_decays_from_one_trunk(runs):
    """Each goes down from the trunk's rate in its own number of steps; the first one is trained, as all would be."""
    before = files_of(runs / "trunk")
    for number, (at, length) in enumerate([(4, 2), (4, 1), (6, 2), (6, 4), (8, 2)]):
        decay = {"schedule": "wsd", "decay_steps": length, "final_learning_rate_fraction": 0.0}
        changes = {
            **TRUNK, "run_name": f"decay-{number}", "resume_from": f"{runs / 'trunk'}@{at}", "steps": at + length,
            "optimizer": {**TRUNK["optimizer"], **decay},
        }  # fmt: skip
        if not number:
            assert 'changed optimizer.schedule: "constant" -> "wsd"' in run(runs.parent, **changes)
            assert rates(runs / "decay-0") == pytest.approx({5: 0.005, 6: 0.0})
            assert dataset(runs / "decay-0", 6)["tokens"] > dataset(runs / "trunk", 4)["tokens"]
            continue
        with loop.Trainer(load_config(write_run_file(runs.parent, **changes)).config, quiet=True) as trainer:
            assert trainer.step == at and trainer.run.path == runs / f"decay-{number}"
            trainer.save()
        assert arrays(runs / f"decay-{number}", at) == arrays(runs / "trunk", at)
        assert dataset(runs / f"decay-{number}", at) == dataset(runs / "trunk", at)
    assert files_of(runs / "trunk") == before


def test_it_goes_on_from_its_own_checkpoint_once_it_has_one(runs, monkeypatch):
    monkeypatch.setattr(loop.Interrupts, "requested", lambda self, step: {5: "SIGTERM"}.get(step))
    name, trunk = "again", f"{runs / 'trunk'}@4"
    with pytest.raises(AssertionError, match="preempted"):
        fork(runs, name, resume_from=trunk)
    monkeypatch.undo()
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)
    said = fork(runs, name, resume_from=trunk).rpartition("resuming from")[2]
    assert said.startswith(" checkpoint 5 at row 40") and "changed" not in said
    assert losses(runs / name) == {step: loss for step, loss in losses(runs / "trunk").items() if step > 4}
    assert json.loads((runs / name / "env.json").read_text())["resumed_from"]["step"] == 4
    config = load_config(write_run_file(runs.parent, **{**TRUNK, "run_name": name, "resume_from": trunk})).config
    with loop.Trainer(config, quiet=True) as trainer:
        assert "nothing left to do" in trainer.outcome.reason
    assert run(runs.parent, force=True, **{**TRUNK, "run_name": name, "resume_from": trunk})
    assert min(losses(runs / name)) == 5


def test_a_stop_before_the_first_step_saves_under_the_own_name(runs, monkeypatch):
    """The state of step 4 is the trunk's; the run's own directory holds none yet."""
    config = load_config(
        write_run_file(runs.parent, **{**TRUNK, "run_name": "saved", "resume_from": f"{runs / 'trunk'}@4"})
    )
    with loop.Trainer(config.config, quiet=True) as trainer:
        assert trainer.save() == trainer.run.checkpoints / "4"
    assert damage(trainer.run.checkpoints / "4") is None


@pytest.mark.parametrize(
    "named", ["{runs}/trunk", "{runs}/trunk/checkpoints", "{link}", "{runs}/trunk/checkpoints/8", "{best}"]
)
def test_what_names_a_run(runs, named, tmp_path):
    (tmp_path / "a@3").symlink_to(runs / "trunk")
    (tmp_path / "best").symlink_to(runs / "trunk" / "checkpoints" / "8")
    named = named.format(runs=runs, link=tmp_path / "a@3", best=tmp_path / "best")
    config = load_config(
        write_run_file(tmp_path, **{**TRUNK, "resume_from": named, "run_name": "new", "steps": 9})
    ).config
    with loop.Trainer(config, quiet=True) as trainer:
        assert trainer.step == 8
    assert not (runs / "trunk" / "LEASE").exists()
    assert "was not compared" not in trainer.run.log.read_text()


def test_a_trunk_without_a_copy_of_its_tokenizer_is_said(runs, tmp_path, capsys):
    """Checkpoints alone, as all are that lie at an address."""
    shutil.copytree(runs / "trunk" / "checkpoints", tmp_path / "apart" / "checkpoints", symlinks=True)
    place = tmp_path / "apart" / "checkpoints"
    changes = {"resume_from": str(place), "run_name": "new", "steps": 9}
    assert dry_run(load_config(write_run_file(tmp_path, **{**TRUNK, **changes})).config) == 0
    assert f"{place} has no copy of its tokenizer here, so data.tokenizer was not" in capsys.readouterr().out
    said = refused(runs, tmp_path, resume_from=f"file://{place}")  # epath has no such
    assert "must be a directory of a file system, gs:// or s3://" in said


def refused(runs, place, **changes):
    config = {**TRUNK, "run_name": "refused", "resume_from": str(runs / "trunk"), "steps": 9, **changes}
    with pytest.raises(UserError) as error:
        loop.Trainer(load_config(write_run_file(place, **config)).config, quiet=True)
    assert checkpoints.saved_steps(place / "runs" / "refused" / "checkpoints") == []
    return str(error.value)


def test_what_is_refused(runs, tmp_path):
    trunk = runs / "trunk"
    assert f"{trunk / 'checkpoints'} holds no whole checkpoint 5: it has 2, 4, 6, 8" in refused(
        runs, tmp_path, resume_from=f"{trunk}@5"
    )
    assert "nowhere is no directory" in refused(runs, tmp_path, resume_from="nowhere")
    assert "has done 8 steps, which count as this run's, and steps is 8" in refused(runs, tmp_path, steps=8)
    assert f"of {trunk} was trained with model.intermediate_size 24" in refused(
        runs, tmp_path, model={"intermediate_size": 32}
    )
    with pytest.raises(UserError, match=r"init_from \(a\) and resume_from \(b\) both say what the run begins with"):
        read_config(load_config(write_run_file(tmp_path)).config, init_from="a", resume_from="b")
    config = {**TRUNK, "resume_from": str(trunk / "checkpoints")}
    with pytest.raises(UserError, match="is this run itself"):
        loop.Trainer(load_config(write_run_file(runs.parent, **config)).config, quiet=True, force=True)
    assert (trunk / "checkpoints" / "8").exists()


def test_what_is_not_whole_is_passed_over_and_not_taken_by_name(runs, tmp_path):
    shutil.copytree(runs / "trunk", tmp_path / "trunk", symlinks=True)
    os.truncate(tmp_path / "trunk/checkpoints/8/dataset/data.json", 3)
    (tmp_path / "trunk/checkpoints/6/commit_success.txt").unlink()
    assert "no whole checkpoint 8: it has 2, 4" in refused(runs, tmp_path, resume_from=f"{tmp_path / 'trunk'}@8")
    config = {**TRUNK, "run_name": "older", "resume_from": str(tmp_path / "trunk")}
    with loop.Trainer(load_config(write_run_file(tmp_path, **config)).config, quiet=True) as trainer:
        assert trainer.step == 4
    for step in (2, 4):
        (tmp_path / f"trunk/checkpoints/{step}/commit_success.txt").unlink()
    assert "holds no whole checkpoint: it has none" in refused(runs, tmp_path, resume_from=str(tmp_path / "trunk"))


@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_that_goes_while_it_is_read_is_said(runs, tmp_path, monkeypatch, before):
    """Also where the reading itself saw nothing of it."""
    shutil.copytree(runs / "trunk", tmp_path / "trunk", symlinks=True)
    restore = checkpoints.restore_state

    def removed(*arguments):
        state = None if before else restore(*arguments)
        shutil.rmtree(tmp_path / "trunk" / "checkpoints" / "8")
        return restore(*arguments) if before else state

    monkeypatch.setattr(checkpoints, "restore_state", removed)
    said = refused(runs, tmp_path, resume_from=str(tmp_path / "trunk"))
    assert f"checkpoint 8 of {tmp_path / 'trunk'} was removed while it was read" in said


def test_a_dry_run_surveys_it(runs, capsys):
    changes = {**TRUNK, "run_name": "dry", "resume_from": f"{runs / 'trunk'}@6", "steps": 9}
    assert dry_run(load_config(write_run_file(runs.parent, **changes)).config) == 0
    out = capsys.readouterr().out
    assert f"begins with checkpoint 6 of {runs / 'trunk'}" in out and "changed steps: 8 -> 9" in out
    with pytest.raises(UserError, match="no whole checkpoint 7"):
        dry_run(load_config(write_run_file(runs.parent, **{**changes, "resume_from": f"{runs / 'trunk'}@7"})).config)


def test_a_dry_run_looks_benchmarks_up(tmp_path, monkeypatch):
    def unknown(names, options, *, longest):
        raise UserError(f"task {names[0]} is unknown")

    monkeypatch.setattr(check, "find_tasks", unknown)
    with pytest.raises(UserError, match="task no_such is unknown"):
        dry_run(load_config(write_run_file(tmp_path, eval={"tasks": {"names": ["no_such"]}})).config)


def test_a_checkpoint_of_another_order_is_refused_before_anything_is_prepared(runs, tmp_path, capsys):
    """One of 0.1.0 has no `order`: a dry run says so, a finished run has nothing left to do."""
    shutil.copytree(runs / "trunk", tmp_path / "runs" / "trunk", symlinks=True)
    place = tmp_path / "runs" / "trunk/checkpoints/8/dataset/data.json"
    text = place.read_text()
    old = json.dumps({key: json.loads(text)[key] for key in ("next_row", "fingerprint", "tokens")})
    place.write_text(old.ljust(len(text)))  # whole is what has its size
    for changes in ({"steps": 9}, {"steps": 9, "resume_from": str(runs / "trunk"), "run_name": "trunk"}):
        config = load_config(write_run_file(tmp_path, **{**TRUNK, **changes})).config
        with pytest.raises(UserError, match=r"checkpoint 8 was made by version 0\.1\.0"):
            dry_run(config)
    assert dry_run(read_config(config, data={"restart": True})) == 0 == dry_run(read_config(config, steps=8))
    assert not (tmp_path / "cache").exists() and "changed steps: 8 -> 9" in capsys.readouterr().out


def test_the_model_may_be_left_to_the_trunk(runs, tmp_path):
    file = Path(write_run_file(tmp_path, **{**TRUNK, "resume_from": f"{runs / 'trunk'}@6"}))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": None}))
    assert load_config(file).config.model == load_config(runs / "trunk" / "config.yaml").config.model


def test_a_fork_whose_trunk_is_gone_has_its_model(runs, tmp_path):
    """One of adapters: its config.yaml names the base in the place of the trunk."""
    gone, run = str(tmp_path / "gone"), tmp_path / "runs" / "fork"
    run.mkdir(parents=True)
    shape = load_config(runs / "trunk" / "config.yaml").config
    (run / "config.yaml").write_text(json.dumps(shape.model_dump(mode="json") | {"init_from": "base"}))
    (run / "env.json").write_text(json.dumps({"resumed_from": {"run": gone, "step": 6}}))
    for named in (gone, f"{gone}@6", f"{gone}/6"):
        file = write_run_file(tmp_path, **{**TRUNK, "run_name": "fork", "resume_from": named})
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model": None}))
        assert load_config(file).config.model == shape.model
    for named, name in ((f"{gone}@4", "fork"), (gone, "another")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"resume_from": named, "run_name": name}))
        with pytest.raises(UserError, match=r"its shape was to be that of resume_from, but .*gone does not exist"):
            load_config(file)
