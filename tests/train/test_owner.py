"""A checkpoint directory belongs to one run."""

import errno
import json
import os
import shutil

import jax.numpy as jnp
import pytest

from mixtral_jax.train import trainer as loop
from mixtral_jax.train.checkpoints.checkpointer import CheckpointConfig, Checkpointer, saved_steps
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import StorageError, UserError
from mixtral_jax.train.run import owner as owners
from mixtral_jax.train.run.owner import check_owner, note_owner
from tests.tiny import metrics_of, write_run_file


def run(name="a", output_dir="runs", **changes):
    return {"run_name": name, "output_dir": output_dir, "optimizer": {"learning_rate": 0.1}, "steps": 9} | changes


def check(directory, config):
    check_owner(directory, config, print)


def test_another_run_is_refused_with_both_names(tmp_path):
    note_owner(tmp_path, run("a"))
    for other in (run("b"), run("a", "elsewhere", optimizer={"learning_rate": 0.2})):
        with pytest.raises(UserError, match=r"belongs to the run a in .*/runs/a, and this is the run [ab] in ") as told:
            check(tmp_path, other)
        assert str(tmp_path) in str(told.value)
    check(tmp_path, run("a", optimizer={"learning_rate": 0.2}))  # a resume
    check(tmp_path, run("a", "moved", steps=20))
    note_owner(tmp_path, run("a", data={"mixture": 1, "workers": 1}))  # one point of a sweep over data
    check(tmp_path, run("a", "moved", data={"mixture": 1, "workers": 2, "cache_dir": "c"}))
    with pytest.raises(UserError, match="belongs to the run a"):
        check(tmp_path, run("a", "moved", data={"mixture": 2, "workers": 1}))
    assert json.loads((tmp_path / "OWNER.json").read_text())["run_name"] == "a"


def save(directory, meta):
    saver = Checkpointer(CheckpointConfig(), directory)
    saver.save({"w": jnp.ones(2)}, 3, {}, meta)
    saver.wait()


@pytest.mark.parametrize("record", [None, "", "{", "[]", '{"run_name": "a"}'])
def test_an_old_directory_is_adopted_by_the_run_that_its_checkpoints_name(tmp_path, record):
    save(tmp_path, {"config": run("a")})
    if record is not None:  # one that was cut off
        (tmp_path / "OWNER.json").write_text(record)
    check(tmp_path, run("a"))
    with pytest.raises(UserError, match=r"belongs to the run a in .* the run b in "):
        check(tmp_path, run("b"))
    assert saved_steps(tmp_path) == [3]


def test_a_moved_run_of_a_version_with_fewer_settings_is_the_same_run(tmp_path):
    """Another mount, or a container: the unchanged run was refused behind every new setting."""
    file = write_run_file(tmp_path, output_dir="runs")
    now = load_config(file).config.model_dump(mode="json")
    before = {key: value for key, value in now.items() if key not in ("on_nonfinite", "max_rollbacks")}
    save(tmp_path / "far", {"config": before | {"output_dir": "/elsewhere"}})
    check(tmp_path / "far", now)
    with pytest.raises(UserError, match="belongs to the run"):
        check(tmp_path / "far", now | {"on_nonfinite": "rollback"})
    note_owner(tmp_path / "far", before | {"output_dir": "/elsewhere"})
    check(tmp_path / "far", now)


def test_what_nobody_has_claimed_is_free(tmp_path):
    for place in (tmp_path / "absent", tmp_path):
        check(place, run("a"))
    save(tmp_path, {"config": {}})  # of somebody who noted no name
    check(tmp_path, run("a"))
    assert not (tmp_path / "absent").exists()


def test_the_runs_own_directory_needs_no_record(tmp_path):
    """A checkpoint of another run that was copied into it is its own; but not one that another run has claimed."""
    mine = run("b", str(tmp_path))
    place = tmp_path / "b" / "checkpoints"
    save(place, {"config": run("a")})
    check(place, mine)
    note_owner(place, mine)
    assert {p.name for p in place.iterdir()} == {"3"}
    note_owner(place, run("c"))
    with pytest.raises(UserError, match="belongs to the run c "):
        check(place, mine)


@pytest.mark.parametrize(("code", "kind"), [(errno.EACCES, UserError), (errno.ENOTDIR, UserError),
                                            (errno.ENOSPC, StorageError), (errno.ESTALE, StorageError)])  # fmt: skip
@pytest.mark.parametrize("inside", [True, False])
def test_a_directory_that_cannot_be_written_to_is_refused_at_the_start(tmp_path, monkeypatch, code, kind, inside):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(owners, "write_atomically", refuse)
    monkeypatch.setattr(owners.epath.Path("/").__class__, "write_text", refuse)
    place = tmp_path / "a" / "checkpoints" if inside else tmp_path / "far"
    with pytest.raises(kind, match=rf"checkpoint.directory: {place} is not writable: {os.strerror(code)}") as caught:
        note_owner(place, run("a", str(tmp_path)))
    assert type(caught.value) is kind


def test_a_directory_that_cannot_be_looked_into_is_refused_at_the_start(tmp_path, monkeypatch):
    def refuse(directory):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(owners, "saved_steps", refuse)
    with pytest.raises(UserError, match="cannot be looked into: Permission denied"):
        check(tmp_path, run("a"))


def test_a_file_in_the_place_of_the_directory_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="Not a directory") as caught:
            check(place, run("a"))
            note_owner(place, run("a"))
        assert type(caught.value) is UserError


def test_the_second_point_of_a_sweep_is_refused_before_anything_is_touched(tmp_path, monkeypatch, capsys):
    """It said "done" with no step trained."""
    monkeypatch.setattr(loop, "make_mesh", lambda config: None)
    far = tmp_path / "far"
    file = write_run_file(tmp_path, steps=3, checkpoint={"directory": str(far)})

    def point(name, rate, force=False):
        config = load_config(file, [f"run_name={name}", f"optimizer.learning_rate={rate}"]).config
        return loop.run(config, force=force)

    assert point("lr1", 0.01) == 0
    before = {path: path.stat().st_mtime_ns for path in far.rglob("*")}
    for force in (False, True):
        with pytest.raises(UserError, match=r"belongs to the run lr1 in .* the run lr2 in "):
            point("lr2", 0.02, force)
    assert {path: path.stat().st_mtime_ns for path in far.rglob("*")} == before
    assert point("lr1", 0.02) == 0 and "nothing left to do" in capsys.readouterr().out
    shutil.rmtree(far)
    assert point("lr2", 0.02) == 0 and len([m for m in metrics_of(tmp_path / "runs/lr2") if "train/loss" in m]) > 0
