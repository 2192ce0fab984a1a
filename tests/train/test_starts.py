"""How a run begins: what a refused start leaves alone, and what is asked of storage before the first step."""

from pathlib import Path

import pytest

from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.run import RunDirectory
from tests.tiny import write_run_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_run_file(tmp_path)


def test_a_refused_start_leaves_the_attempt_of_another_one(file):
    """It has no number of its own yet, and the directory of the last may be empty for as long as data are prepared."""
    config, given = load_config(file)
    first = RunDirectory(config.run_dir)
    first.begin()
    RunDirectory(config.run_dir).write_failure("another process writes there", 2)
    assert (first.attempts / "1").is_dir()
    (first.attempts / "1").rmdir()
    first.describe(config, given, None)
    assert (first.attempts / "1" / "config.yaml").exists()


def test_a_refused_start_that_has_begun_takes_its_number_back(file):
    place = RunDirectory(load_config(file).config.run_dir)
    place.begin()
    place.write_failure("the data are no records", 2)
    assert not (place.attempts / "1").exists()
