"""A run that is given in passes over the data."""

import math
from pathlib import Path

import pytest

from mixtral_jax.data.prepare.prepared import prepare
from mixtral_jax.data.rows import batches
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.trainer import settle_steps
from tests.tiny import write_run_file


@pytest.mark.parametrize("epochs", [1, 2.5])
def test_steps_are_epochs_times_rows_over_the_batch(tmp_path: Path, epochs: float) -> None:
    config, _ = load_config(write_run_file(tmp_path, steps=0, data={"epochs": epochs}))
    settled = settle_steps(config)
    rows = sum(source.rows for source in prepare(config.data, config.seq_len, config.seed).train)
    assert settled.steps == math.ceil(epochs * rows / 8)
    assert settled.data.epochs is None
    assert settled == config.model_copy(update={"steps": settled.steps, "data": settled.data})
    assert settle_steps(settled) is settled


def test_epochs_are_decimal_numbers() -> None:
    """In floats 1.1 passes over 100 rows are 110.00000000000001 rows, for which `data preview` took a batch more."""
    assert [batches(e, 100, 10, trained) for e, trained in ((1.1, 0), (1.1, 1), (1.2, 111), (1, 200))] == [11, 11, 1, 0]


def test_a_warm_up_that_turns_out_too_long_is_said(tmp_path: Path) -> None:
    file = write_run_file(tmp_path, steps=0, data={"epochs": 1}, optimizer={"warmup_steps": 1000})
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps \(1000\) is not smaller than steps"):
        settle_steps(load_config(file).config)
