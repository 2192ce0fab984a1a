"""Which step is saved when, which is found again, and which is the best."""

from mixtral_jax.train.checkpoints.best import (
    Best,
    EarlyStoppingConfig,
    comparable,
    note_evaluation,
    watching_problems,
)
from mixtral_jax.train.checkpoints.checkpointer import (
    CheckpointConfig,
    Checkpointer,
    Found,
    Saved,
    Say,
    discard_unfinished,
    find,
    find_together,
    name_best,
    restore_state,
    saved_steps,
    stands,
    whole_steps,
)
from mixtral_jax.train.checkpoints.patience import patiently, remedy, why
from mixtral_jax.train.checkpoints.together import Together
