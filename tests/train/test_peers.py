"""What STATUS says of a failure is what the command line makes of it."""

import json
from pathlib import Path

import pytest

from mixtral_jax.train.checkpoints.checkpointer import Found
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.peers import failures_reported
from mixtral_jax.train.run.resume import check_same_data


def our_mistake():
    check_same_data(Found(4, Path(), {"fingerprint": "a"}, {}), "b", restart=False)


def library_mistake():
    json.loads("{")


def not_allowed():
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("fail", "exit_code", "reason"),
    [
        (our_mistake, 2, "UserError: checkpoint 4"),
        (library_mistake, 1, "JSONDecodeError: "),
        (not_allowed, 2, "PermissionError: "),
    ],
)
def test_status_has_the_exit_code_of_the_process(tmp_path, fail, exit_code, reason):
    place = RunDirectory(tmp_path)
    with pytest.raises((ValueError, OSError)), failures_reported(place):
        fail()
    status = json.loads((tmp_path / "STATUS").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", exit_code)
    assert status["reason"].startswith(reason)
