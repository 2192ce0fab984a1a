"""The length of a run that is given in passes over the data."""

import math

from data.prepare import prepare
from train.config import RunConfig
from train.validate import rebuilt


def settle_steps(config: RunConfig) -> RunConfig:
    """The same run with `steps` instead of data.epochs: epochs * rows / global_batch_size, rounded up.

    Prepares the data where that was not done yet, since only then the number of rows is known.

    Raises:
        UserError: with the steps known, other fields do not fit (a warm-up that is longer than the run, say).
    """
    if config.data.epochs is None:
        return config
    prepared = prepare(config.data, config.seq_len, config.seed)
    rows = sum(source.rows for source in prepared.train)
    steps = math.ceil(config.data.epochs * rows / config.global_batch_size)
    return rebuilt(config, {"steps": steps, "data": {"epochs": None}})
