"""A run on this machine: its directory, its processes, signals, and what it says at the start."""

from mixtral_jax.train.run.account import Account, begin_at
from mixtral_jax.train.run.check import kernels_of, sizes_of, task_options, tasks_of
from mixtral_jax.train.run.directory import RunDirectory
from mixtral_jax.train.run.environment import OPTIONAL, installed
from mixtral_jax.train.run.fork import restored
from mixtral_jax.train.run.heartbeat import watch
from mixtral_jax.train.run.masks import mask_lines
from mixtral_jax.train.run.peers import end, failures_reported
from mixtral_jax.train.run.processes import initialize
from mixtral_jax.train.run.resume import (
    changed_since,
    tree_changes,
    where_to_start,
)
from mixtral_jax.train.run.rollback import roll_back
from mixtral_jax.train.run.screen import compiled, dry_run, first_screen
from mixtral_jax.train.run.signals import Interrupts
from mixtral_jax.train.run.tokenizer_copy import kept_template
from mixtral_jax.train.run.underway import extra_hooks, open_files
from mixtral_jax.train.run.xla_flags import set_xla_flags
