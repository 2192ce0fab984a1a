"""Which step is saved when, which is found again, and which is the best."""

from mixtral_jax.train.checkpoints.best import Best, EarlyStoppingConfig, watching_problems
from mixtral_jax.train.checkpoints.checkpointer import (
    CheckpointConfig,
    Checkpointer,
    Found,
    Saved,
    Say,
    discard,
    discard_unfinished,
    find,
    restore_state,
    saved_steps,
)
