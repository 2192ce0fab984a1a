"""Which checkpoint is kept, found, refused; what a failed save leaves."""

import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixtral_jax.checkpoint import trees as arrays
from mixtral_jax.train.base import read_weights
from mixtral_jax.train.checkpoints.best import note_evaluation
from mixtral_jax.train.checkpoints.checkpointer import (
    CheckpointConfig,
    Checkpointer,
    Saved,
    find,
    find_together,
    restore_state,
    saved_steps,
)
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.optimizer import OptimizerConfig, decay_mask, make_optimizer, router_mask
from mixtral_jax.train.run.resume import config_differences
from mixtral_jax.train.state import abstract_state, create_state, start_from
from tests.tiny import split, tiny_config, tiny_model

OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
DATA = {"next_row": 40, "fingerprint": "abc", "tokens": 100}


def params(value=1.0):
    return {"head": {"weight": jnp.full((4, 6), value)}, "norm": {"scale": jnp.ones(6)}}


def abstract(rows=4):
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=here)
    return abstract_state({"head": {"weight": shape((rows, 6))}, "norm": {"scale": shape((6,))}}, OPTIMIZER)


def save_steps(directory, steps, **config):
    checkpointer = Checkpointer(CheckpointConfig(**config), directory)
    for step in steps:
        checkpointer.save(create_state(params(step), OPTIMIZER), step, DATA, {"step": step, "config": {}})
    checkpointer.wait()
    return checkpointer


def nothing_said(line):
    raise AssertionError(line)


def test_saved_state_comes_back_with_its_position_and_meta(tmp_path):
    save_steps(tmp_path, [5])
    found = find(tmp_path, "auto", nothing_said)
    assert found is not None and (found.step, found.dataset, found.meta["step"]) == (5, DATA, 5)
    state = restore_state(found, abstract())
    expected = create_state(params(5), OPTIMIZER)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), state, expected)))
    assert {p.name for p in (tmp_path / "5").iterdir()} >= {"state", "dataset", "meta"}


def test_a_checkpoint_whose_chain_scales_the_router_comes_back(tmp_path):
    """As runs with a frozen or slower router, which are most LoRA runs, wrote them until 2026-11-28."""
    scaled = optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(0.1, decay_mask), optax.masked(optax.scale(0.5), router_mask)
    )
    old = OPTIMIZER._replace(transformation=scaled)
    checkpointer = Checkpointer(CheckpointConfig(), tmp_path)
    checkpointer.save(create_state(params(2), old), 5, DATA, {"step": 5, "config": {}})
    checkpointer.wait()
    state = restore_state(find(tmp_path, "auto", nothing_said), abstract())
    jax.tree.map(np.testing.assert_array_equal, state, create_state(params(2), OPTIMIZER))


def test_the_newest_and_the_multiples_are_kept(tmp_path):
    save_steps(tmp_path, [2, 4, 6, 8, 10], keep_last=2, keep_every=4)
    assert saved_steps(tmp_path) == [4, 8, 10]


def test_when_a_checkpoint_is_due(tmp_path):
    checkpointer = Checkpointer(CheckpointConfig(every=3), tmp_path)
    assert [s for s in range(1, 9) if checkpointer.due(s, last=s == 8)] == [3, 6, 8]
    never = Checkpointer(CheckpointConfig(every=None), tmp_path)
    assert [s for s in range(1, 9) if never.due(s, last=s == 8)] == [8]


def test_a_finished_save_is_reported_once(tmp_path):
    checkpointer = Checkpointer(CheckpointConfig(), tmp_path)
    assert checkpointer.save(create_state(params(), OPTIMIZER), 1, DATA, {}) is None
    saved = checkpointer.wait()
    assert isinstance(saved, Saved) and saved.step == 1 and saved.bytes > 0
    assert checkpointer.wait() is None


def damage_truncate(path: Path):
    file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(file, 10)


def damage_uncommit(path: Path):
    (path / arrays.COMMIT).unlink()


def damage_unreadable(path: Path):
    """Sizes are right, contents are not."""
    file = path / "meta" / "data.json"
    file.write_text("x" * file.stat().st_size)


@pytest.mark.parametrize("damage", [damage_truncate, damage_uncommit, damage_unreadable])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    save_steps(tmp_path, [3, 6])
    damage(tmp_path / "6")
    said = []
    found = find(tmp_path, "auto", said.append)
    assert found is not None and found.step == 3
    assert len(said) == 1
    assert "checkpoint 6 is not whole" in said[0] and "using checkpoint 3 instead" in said[0]
    # and the run that goes on from 3 replaces it
    save_steps(tmp_path, [6])
    again = find(tmp_path, "auto", nothing_said)
    assert again is not None and again.step == 6


def test_a_broken_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    """keep_last 1, a broken 8 above a good 6: the save of 7 left the broken one alone."""
    save_steps(tmp_path, [6, 8], keep_last=9)
    damage_uncommit(tmp_path / "8")
    save_steps(tmp_path, [7], keep_last=1)
    found = find(tmp_path, "auto", lambda line: None)
    assert found is not None and found.step == 7 and saved_steps(tmp_path) == [7]
    save_steps(tmp_path, [8], keep_last=1)
    assert saved_steps(tmp_path) == [8] and arrays.damage(tmp_path / "8") is None


def test_what_is_saved_behind_a_roll_back_is_what_the_next_start_takes(tmp_path):
    """A checkpoint of the steps taken back had the higher number, and led to the same bad step for ever."""
    save_steps(tmp_path, [4, 6])
    saver = Checkpointer(CheckpointConfig(), tmp_path, 4)  # where the run went back to
    saver.save(create_state(params(), OPTIMIZER), 5, DATA, {})
    saver.wait()
    found = find(tmp_path, "auto", nothing_said)
    assert found is not None and found.step == 5 and saved_steps(tmp_path) == [4, 5]


@pytest.mark.parametrize("damage", [damage_truncate, damage_uncommit])
def test_broken_ones_between_whole_ones_do_not_count(tmp_path, damage):
    save_steps(tmp_path, [2, 4, 6], keep_last=9)
    damage(tmp_path / "6")
    save_steps(tmp_path, [8], keep_last=2)
    assert saved_steps(tmp_path) == [4, 8]


def test_what_was_evaluated_behind_a_save_is_found_with_it(tmp_path):
    """Each process read the note for itself, and went another way where it did not see it."""
    save_steps(tmp_path, [3])
    note_evaluation(tmp_path / "3", {"step": 3})
    found = find_together(tmp_path, "auto", nothing_said)
    assert found is not None and found.meta["evaluation_owed"] is False and found.meta["best"] == {"step": 3}


def test_if_none_is_whole_it_says_so(tmp_path):
    save_steps(tmp_path, [3, 6])
    damage_truncate(tmp_path / "3")
    damage_uncommit(tmp_path / "6")
    with pytest.raises(UserError, match=r"checkpoint 6 is not whole .*checkpoint 3 is not whole .*none is whole"):
        find(tmp_path, "auto", nothing_said)


def test_what_resume_asks_for(tmp_path):
    assert find(tmp_path / "absent", "auto", nothing_said) is None
    with pytest.raises(UserError, match=r"resume: must, but .* holds no checkpoint"):
        find(tmp_path / "absent", "must", nothing_said)
    save_steps(tmp_path, [3, 6])
    assert find(tmp_path, "never", nothing_said) is None
    found = find(tmp_path, 3, nothing_said)
    assert found is not None and found.step == 3
    with pytest.raises(UserError, match=r"resume: 4: .* has no such checkpoint; it has 3, 6"):
        find(tmp_path, 4, nothing_said)


def test_unfinished_saves_and_other_files_are_no_checkpoints(tmp_path):
    save_steps(tmp_path, [3])
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    assert saved_steps(tmp_path) == [3]


def test_another_model_shape_is_an_error_that_names_the_leaf(tmp_path):
    save_steps(tmp_path, [3])
    found = find(tmp_path, "auto", nothing_said)
    assert found is not None
    with pytest.raises(UserError, match=r"params\.head\.weight has shape \(4, 6\) .* but \(5, 6\) in the model"):
        restore_state(found, abstract(rows=5))


def test_a_refused_save_is_raised_and_the_one_before_stands(tmp_path, monkeypatch):
    save_steps(tmp_path, [3])
    checkpointer = Checkpointer(CheckpointConfig(), tmp_path)
    monkeypatch.setattr(arrays.PendingSave, "result", refuse)
    checkpointer.save(create_state(params(6), OPTIMIZER), 6, DATA, {})
    with pytest.raises(OSError, match="No space left"):
        checkpointer.wait()
    monkeypatch.undo()
    found = find(tmp_path, 3, nothing_said)
    assert found is not None and found.step == 3


def refuse(self):
    self._response.result()
    raise OSError(28, "No space left on device")


def test_differences_are_listed_by_their_dotted_path():
    before = {"steps": 10, "optimizer": {"learning_rate": 1e-3, "b1": 0.9}}
    now = {"steps": 20, "optimizer": {"learning_rate": 5e-4, "b1": 0.9}}
    assert config_differences(before, now) == ["steps: 10 -> 20", "optimizer.learning_rate: 0.001 -> 0.0005"]
    assert config_differences(now, now) == []


def test_weights_alone_start_a_new_run(tmp_path):
    config = tiny_config()
    weights, _ = split(tiny_model(config))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), weights)
    checkpointer = Checkpointer(CheckpointConfig(), tmp_path)
    meta = {"step": 3, "config": {"model": config.model_dump()}}
    checkpointer.save(create_state(weights, OPTIMIZER), 3, DATA, meta)
    checkpointer.wait()
    state = start_from(read_weights(str(tmp_path / "3"), asked), OPTIMIZER, abstract_state(asked, OPTIMIZER))
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, weights)
    arrays.save(tmp_path / "model" / "params", jax.tree.map(lambda x: x + 1, weights))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_hf()))
    loaded = read_weights(str(tmp_path / "model"), asked)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), loaded, weights)
    with pytest.raises(UserError, match="is no checkpoint"):
        read_weights(str(tmp_path / "nothing"), asked)
    asked["norm"]["scale"] = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=here)
    with pytest.raises(UserError, match=r"init_from: norm\.scale has shape \(16,\) .* with shape \(5,\)"):
        read_weights(str(tmp_path / "model"), asked)


def test_fresh_state_lies_where_its_parameters_lie():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    spec = jax.sharding.PartitionSpec
    shardings = {
        "head": {"weight": jax.sharding.NamedSharding(mesh, spec("tensor", "fsdp"))},
        "norm": {"scale": jax.sharding.NamedSharding(mesh, spec())},
    }
    placed = jax.device_put(params(), shardings)
    state = start_from(placed, OPTIMIZER, abstract_state(placed, OPTIMIZER))
    assert state.params["head"]["weight"].sharding.spec == spec("tensor", "fsdp")
    assert state.optimizer.moments[0].mu["head"]["weight"].sharding.spec == spec("tensor", "fsdp")
    assert state.optimizer.moments[0].nu["norm"]["scale"].sharding.spec == spec()
    assert state.step.sharding.spec == spec()
