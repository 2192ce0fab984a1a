"""What happens between steps: log, checkpoint, sample, profile, watchdog; each with an interval."""

import faulthandler
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from train.best import Best
from train.checkpoint import Checkpointer, Saved, saved_steps
from train.console import Console, train_line
from train.errors import UserError
from train.metrics import JsonLines, Throughput, Writer
from train.optimizer import Params
from train.state import TrainState
from train.step import StepReport

EXIT_WATCHDOG = 124


class SampleConfig(FrozenConfig):
    """Text that the model writes while it learns."""

    every: int | None = Field(None, gt=0, description="steps between samples; null: none")
    prompts: tuple[str, ...] = Field((), description="beginnings to continue; an empty one starts from BOS")
    max_new_tokens: int = Field(64, gt=0, description="length of each sample in tokens")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token")


class WandbConfig(FrozenConfig):
    """Weights & Biases. A tracker that fails never stops the training."""

    project: str = Field("mixtral-jax", description="project name")
    entity: str | None = Field(None, description="user or team; null: your default one")
    mode: str = Field("offline", pattern="^(offline|online)$", description="online needs the network")


class ProfileConfig(FrozenConfig):
    """A jax.profiler trace, written to <run>/profile."""

    start: int = Field(10, gt=1, description="step at which the trace begins")
    steps: int = Field(3, gt=0, description="how many steps it covers")


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


class Moment(NamedTuple):
    """What a hook sees after a step. The state is valid until the hook returns: the next step donates it."""

    step: int  # updates done
    state: TrainState
    report: StepReport
    tokens: int  # not padding, since the run began
    last: bool  # no step follows


class Hook(Protocol):
    """Something that happens between steps."""

    def due(self, step: int, last: bool) -> bool:
        """After this step?"""
        ...

    def run(self, moment: Moment) -> None:
        """Do it."""
        ...


class Log:
    """train/*, moe/* and perf/* to every sink, one line to the console, expert counts to moe.jsonl."""

    def __init__(
        self, config: LogConfig, writer: Writer, moe_lines: JsonLines | None, throughput: Throughput,
        waited: Callable[[], float], console: Console, steps: int,
    ):  # fmt: skip
        self._every, self._writer, self._moe_lines = config.every, writer, moe_lines
        self._throughput, self._waited, self._console, self._steps = throughput, waited, console, steps
        self._param_norm = jax.jit(optax.tree.norm)

    def due(self, step: int, last: bool) -> bool:
        return last or step % self._every == 0

    def run(self, moment: Moment) -> None:
        metrics = to_floats(moment.report.scalars)
        learned = metrics.get("train/learned_tokens", 0.0) / max(metrics.get("train/tokens", 0.0), 1.0)  # this step's
        metrics["train/tokens"] = moment.tokens
        metrics["train/param_norm"] = float(self._param_norm(moment.state.params))
        metrics |= self._throughput.read(self._waited())
        speed = metrics["perf/tokens_per_second"]
        metrics["perf/trainable_tokens_per_second"] = None if speed is None else learned * speed
        self._writer.write(moment.step, metrics)
        if self._moe_lines is not None and moment.report.counts_LE is not None:
            counts = np.asarray(moment.report.counts_LE).astype(int).tolist()
            self._moe_lines.write(moment.step, {"counts": counts})
        left = (self._steps - moment.step) * (metrics["perf/step_seconds"] or 0.0)
        self._console.say(train_line(moment.step, self._steps, metrics, left))


class Checkpoint:
    """Saves the state, the position in the data and the configuration; reports finished saves."""

    def __init__(
        self, checkpointer: Checkpointer, writer: Writer, console: Console,
        items: Callable[[Moment], tuple[dict[str, Any], dict[str, Any]]], best: Best,
    ):  # fmt: skip
        self._checkpointer, self._writer, self._console, self._items = checkpointer, writer, console, items
        self._best = best

    def due(self, step: int, last: bool) -> bool:
        return self._checkpointer.due(step, last) or step == self._best.step

    def run(self, moment: Moment) -> None:
        """Raises UserError where the file system refuses; the checkpoints before stand."""
        dataset, meta = self._items(moment)
        best = self._best.step
        self._attempt(lambda: self._checkpointer.save(moment.state, moment.step, dataset, meta, best), moment.step)

    def finish(self, step: int) -> None:
        """Wait for the save under way."""
        self._attempt(self._checkpointer.wait, step)

    def _attempt(self, action: Callable[[], Saved | None], step: int) -> None:
        try:
            saved = action()
        except OSError as error:
            steps = [s for s in saved_steps(self._checkpointer.directory) if s != step]
            stands = f"checkpoint {steps[-1]} stands" if steps else "there is no earlier checkpoint"
            reason = error.strerror or error
            raise UserError(
                f"a checkpoint could not be written to {self._checkpointer.directory}: {reason}; {stands}"
            ) from error
        if saved is not None:
            self._writer.write(saved.step, {"checkpoint/seconds": saved.seconds, "checkpoint/bytes": saved.bytes})
            self._console.say(f"checkpoint {saved.step}: {saved.bytes / 1e6:.1f} MB in {saved.seconds:.1f} s")


class Sample:
    """Continues the prompts; writes samples/<step>.jsonl and shows the beginnings."""

    def __init__(
        self, config: SampleConfig, continue_prompts: Callable[[Params], list[str]], directory: Path, console: Console
    ):
        self._config, self._continue, self._directory, self._console = config, continue_prompts, directory, console

    def due(self, step: int, last: bool) -> bool:
        every = self._config.every
        return every is not None and (last or step % every == 0)

    def run(self, moment: Moment) -> None:
        pairs = list(zip(self._config.prompts, self._continue(moment.state.params), strict=True))
        for prompt, text in pairs:
            self._console.say(f"  {prompt}⟶{' '.join(text.split())[:160]}")
        if jax.process_index() == 0:
            self._directory.mkdir(exist_ok=True)
            lines = [json.dumps({"step": moment.step, "prompt": p, "text": t}, ensure_ascii=False) for p, t in pairs]
            (self._directory / f"{moment.step}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Profile:
    """A jax.profiler trace over a few steps."""

    def __init__(self, config: ProfileConfig, directory: Path, console: Console):
        self._first, self._end, self._directory, self._console = (
            config.start,
            config.start + config.steps,
            directory,
            console,
        )
        self._tracing = False

    def due(self, step: int, last: bool) -> bool:
        return step + 1 == self._first or (self._tracing and (last or step + 1 >= self._end))

    def run(self, moment: Moment) -> None:
        if self._tracing:
            jax.block_until_ready(moment.state)
            jax.profiler.stop_trace()
            self._console.say(f"profile of steps {self._first} to {moment.step} in {self._directory}")
        elif not moment.last:
            jax.profiler.start_trace(str(self._directory))
        self._tracing = not self._tracing and not moment.last


class Watchdog:
    """Ends the process where no step finishes for `seconds`: exit 124, with every thread's stack on stderr.

    It starts with the first beat, so that compilation does not count.
    """

    def __init__(self, seconds: float | None, on_bite: Callable[[str], None]):
        self._seconds, self._on_bite = seconds or math.inf, on_bite
        self._last = math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Something moved."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(self._seconds / 4, 5.0)):
            if time.monotonic() - self._last > self._seconds:
                faulthandler.dump_traceback(all_threads=True)
                self._on_bite(f"no step finished for {self._seconds:g} s (log.watchdog_seconds)")
                os._exit(EXIT_WATCHDOG)


def to_floats(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """One transfer off the device."""
    return {name: float(value) for name, value in jax.device_get(dict(scalars)).items()}
