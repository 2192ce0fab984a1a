"""What happens between steps: log, evaluate, save, sample, profile, watch."""

from mixtral_jax.train.hooks.checkpoint import Checkpoint
from mixtral_jax.train.hooks.due import run_due
from mixtral_jax.train.hooks.evaluate import BrokenOff, EvalConfig, Evaluate, TasksConfig, measure_sources
from mixtral_jax.train.hooks.ledger import Diverged, Ledger
from mixtral_jax.train.hooks.log import Log, LogConfig
from mixtral_jax.train.hooks.moment import Hook, Moment
from mixtral_jax.train.hooks.profile import Profile
from mixtral_jax.train.hooks.sample import Sample, SampleConfig
from mixtral_jax.train.hooks.sinks import JsonLines, TensorBoard, Wandb, Writer, open_trackers
from mixtral_jax.train.hooks.throughput import Throughput
from mixtral_jax.train.hooks.watchdog import Watchdog, limits_of
