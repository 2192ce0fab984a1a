"""The run file: its schema, and every problem of it named at once."""

from mixtral_jax.train.config.load import (
    STAGES,
    MachineConfig,
    Provenance,
    check_vocabulary,
    json_schema,
    load_config,
    machine_config,
    read_config,
    resolved_yaml,
)
from mixtral_jax.train.config.schema import DpoStageConfig, RunConfig, TuningConfig, check_sizes
from mixtral_jax.train.config.taken import run_and_step, shape_of
from mixtral_jax.train.config.tree import read_tree
