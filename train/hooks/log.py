"""What is said of every few steps, and where."""

import contextlib
from collections.abc import Callable

import jax
import numpy as np
import optax
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.train.console import Console, train_line
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.hooks.profile import ProfileConfig
from mixtral_jax.train.hooks.sinks import JsonLines, Writer
from mixtral_jax.train.hooks.throughput import Throughput
from mixtral_jax.train.hooks.watchdog import PhaseSeconds


class WandbConfig(FrozenConfig):
    """Weights & Biases. A tracker that fails never stops the training."""

    project: str = Field("mixtral-jax", description="project name")
    entity: str | None = Field(None, description="user or team; null: your default one")
    mode: str = Field("offline", pattern="^(offline|online)$", description="online needs the network")


class LogConfig(FrozenConfig):
    """What is said, where and how often; metrics.jsonl is always written."""

    every: int = Field(10, gt=0, description="steps between log lines")
    progress: bool = Field(True, description="a progress bar where stdout is a terminal")
    tensorboard: bool = Field(True, description="events in <run>/tensorboard")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; null: off")
    profile: ProfileConfig | None = Field(None, description="a profiler trace; null: none")
    watchdog_seconds: float | None = Field(
        None, gt=0, description="exit 124 where one step takes longer than this; null: never"
    )
    phase_seconds: PhaseSeconds = PhaseSeconds()


class Log:
    """train/*, moe/*, perf/* and data/* to every sink, one line to the console, expert counts to moe.jsonl."""

    def __init__(
        self, config: LogConfig, writer: Writer, moe_lines: JsonLines | None, throughput: Throughput,
        waited: Callable[[], float], console: Console, steps: int,
        data: Callable[[int], dict[str, float | None]] = lambda step: {},
    ):  # fmt: skip
        self._every, self._writer, self._moe_lines = config.every, writer, moe_lines
        self._throughput, self._waited, self._console, self._steps = throughput, waited, console, steps
        self._data = data  # data/* behind a step
        self._param_norm = jax.jit(optax.tree.norm)

    def due(self, step: int, last: bool) -> bool:
        return last or step % self._every == 0

    def run(self, moment: Moment) -> None:
        metrics = moment.metrics
        learned = metrics.get("train/learned_tokens", 0.0) / max(metrics.get("train/tokens", 0.0), 1.0)  # this step's
        metrics["train/tokens"] = moment.tokens
        metrics["train/param_norm"] = float(self._param_norm(moment.state.params))
        metrics |= self._throughput.read(self._waited()) | self._data(moment.step)
        speed = metrics["perf/tokens_per_second"]
        metrics["perf/trainable_tokens_per_second"] = None if speed is None else learned * speed
        with contextlib.ExitStack() as both:  # where the disk is full each file keeps its line until there is room
            if self._moe_lines is not None and moment.report and moment.report.counts_LE is not None:
                counts = np.asarray(moment.report.counts_LE).astype(int).tolist()
                both.callback(self._moe_lines.write, moment.step, {"counts": counts})
            self._writer.write(moment.step, metrics)
        left = (self._steps - moment.step) * (metrics["perf/step_seconds"] or 0.0)
        self._console.say(train_line(moment.step, self._steps, metrics, left))
