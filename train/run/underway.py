"""What a run has open while it trains: its files with the trackers beside them, and the hooks that were asked for."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import jax

from mixtral_jax.train.config import RunConfig
from mixtral_jax.train.console import Console
from mixtral_jax.train.hooks import (
    Hook,
    JsonLines,
    Profile,
    Sample,
    TensorBoard,
    Wandb,
    Writer,
    open_trackers,
)
from mixtral_jax.train.optimizer import Params
from mixtral_jax.train.run.directory import RunDirectory


def open_files(
    run: RunDirectory, config: RunConfig, start: int, owed: bool, opened: ExitStack
) -> tuple[Writer, JsonLines | None]:
    """metrics.jsonl with the trackers that were asked for, and moe.jsonl, from step `start` on; process 0 alone writes.

    `opened` closes them. Where an evaluation is `owed`, the step's will be written again.
    """
    if jax.process_index() > 0 or run.ended:  # a run that is done has its lines, and may be another process's by now
        return Writer(None), None
    makers: list[Callable[[], Any]] = []
    if config.log.tensorboard:
        makers.append(lambda: TensorBoard(run.tensorboard, start))
    if (wandb := config.log.wandb) is not None:
        described = config.model_dump(mode="json")
        makers.append(lambda: Wandb(run.path, wandb.model_dump(), config.run_name, described))
    tasks = () if config.eval.tasks is None else config.eval.tasks.names
    own = ("eval/loss", *(f"eval/{name.partition('*')[0]}" for name in tasks))  # others are of `eval --tasks`
    lines = JsonLines(run.metrics, start, run.attempt, again=own if owed else ())
    metrics = Writer(lines, open_trackers(makers))
    opened.enter_context(closing(metrics))
    counts = None if config.model.is_dense else opened.enter_context(closing(JsonLines(run.moe, start)))
    return metrics, counts


def extra_hooks(
    run: RunDirectory, config: RunConfig, generate: Callable[[Params, list[Any]], list[str]], console: Console,
    opened: ExitStack,
) -> list[Hook]:  # fmt: skip
    """Samples and the profile, where they were asked for; `opened` ends a trace."""
    hooks: list[Hook] = []
    if config.sample.every is not None and config.sample.prompts:
        chat = config.data.examples != "text"
        hooks.append(Sample(config.sample, generate, chat, run.samples, console, run.phases))
    if config.log.profile is not None:
        hooks.append(opened.enter_context(closing(Profile(config.log.profile, run.profile, console))))
    return hooks
