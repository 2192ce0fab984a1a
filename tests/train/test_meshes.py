"""A run that goes on on another mesh, and on another, is the run that nobody moved (NUMERICS G3)."""

import json
import shutil

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint.trees import tree_shapes
from mixtral_jax.parallel.mesh import make_mesh
from mixtral_jax.train import feed
from mixtral_jax.train import trainer as loop
from mixtral_jax.train.config.load import load_config
from tests.processes import record_rows
from tests.tiny import metrics_of, write_run_file

VOCABULARY = 259  # tensor does not divide it


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


def train(directory, name, mesh, devices, steps):
    changes = {
        "log": {"every": 1}, "checkpoint": {"every": 2, "keep_last": 9}, "optimizer": {"schedule": "constant"},
        "data": {"validation": []}, "model": {"vocab_size": VOCABULARY},
    }  # fmt: skip
    file = write_run_file(directory, **changes)
    overrides = [f"run_name={name}", f"mesh={json.dumps(mesh)}", f"steps={steps}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        patch.setattr(feed.Feed, "__init__", feed.Feed.__init__)  # put back what the next line changes
        record_rows(directory / f"rows {name} {devices} {steps}")
        assert loop.run(*load_config(file, overrides)) == 0


def rows_of(directory, name, devices, steps, count):
    where = directory / f"rows {name} {devices} {steps}"
    return np.stack([np.load(where / f"0-{number}.npy") for number in range(count)])


def losses(directory, name):
    return {line["step"]: line["train/loss"] for line in metrics_of(directory / "runs" / name) if "train/loss" in line}


def test_from_fsdp_8_to_experts_and_tensor_to_one_device(directory):
    train(directory, "still", {"data": 1, "fsdp": 8}, 8, 6)
    runs = directory / "runs"
    shutil.copytree(runs / "still/checkpoints/2", runs / "moved/checkpoints/2")
    train(directory, "moved", {"data": 1, "expert": 4, "tensor": 2}, 8, 4)
    assert tree_shapes(runs / "moved/checkpoints/4")["params.embed.weight"][0] == (VOCABULARY, 16)
    train(directory, "moved", {"data": 1}, 1, 6)
    whole = rows_of(directory, "still", 8, 6, 6)
    np.testing.assert_array_equal(rows_of(directory, "moved", 8, 4, 2), whole[2:4])
    np.testing.assert_array_equal(rows_of(directory, "moved", 1, 6, 2), whole[4:6])
    still, moved = losses(directory, "still"), losses(directory, "moved")
    assert sorted(moved) == [3, 4, 5, 6]
    assert moved == pytest.approx({step: still[step] for step in moved}, rel=1e-5)
