"""Which metrics stand in which chart, and the charts of one run or of several over each other."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mixtral_jax.train.errors import ExitCode
from mixtral_jax.train.pages import Mark, Series, lines
from mixtral_jax.train.report.run import Axes, Run, lost_steps
from mixtral_jax.train.report.thin import Point, smoothed


class Chart(NamedTuple):
    """`lines`: what each is called -> its metric; a * in a metric stands for a name, which is the line's,
    with a filter behind it where a task's metric has several.
    """

    title: str
    lines: Mapping[str, str]
    unit: str = ""
    log: bool | None = None  # how y begins, where it can be switched
    times: float = 1.0


def _one(title: str, metric: str, *more: Any) -> Chart:
    return Chart(title, {title.lower(): metric}, *more)


LEARNING = (
    Chart("Loss", {"training": "train/loss", "cross-entropy": "train/ce_loss", "of pairs": "train/pair_loss",
                   "held out": "eval/loss"}, "", False),
    Chart("Held-out bits per byte", {"all sources": "eval/bits_per_byte", "": "eval/*/bits_per_byte"}, "", False),
    Chart("Held-out loss by source", {"": "eval/*/loss"}, "", False),
    Chart("Accuracy of the next token", {"training": "train/accuracy", "held out": "eval/accuracy"}, " %", None, 100),
    Chart("Tasks: accuracy", {"": "eval/*/acc"}, " %", None, 100),
    Chart("Tasks: exact match", {"": "eval/*/exact_match"}, " %", None, 100),
    Chart("Rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"}),
    Chart("Chosen before rejected", {"training": "rewards/accuracies", "held out": "eval/rewards/accuracies"}, " %",
          None, 100),
    Chart("Log-probability of the answers", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
    Chart("Log odds", {"of the chosen": "log_odds_chosen", "of their ratio": "log_odds_ratio"}),
    _one("Entropy of the prediction", "train/entropy", " nats"),
)  # fmt: skip
OPTIMIZER = (
    _one("Learning rate", "train/learning_rate", "", False),
    _one("Norm of the gradient", "train/grad_norm", "", False),
    _one("Norm of the parameters", "train/param_norm"),
    _one("Updates left out", "train/skipped"),
)
ROUTER = (
    Chart("Load of an expert, 1 is even", {"busiest": "moe/load_max", "idlest": "moe/load_min"}),
    _one("Balance loss", "moe/balance"),
    _one("Entropy of the router", "moe/entropy", " nats"),
    _one("z-loss", "moe/z", "", False),
    Chart("Terms of the loss", {"balance": "train/aux_loss", "z": "train/z_loss"}, "", False),
    Chart("Choices dropped", {"any": "moe/dropped_fraction", "a token's first": "moe/dropped_first"}, " %", None, 100),
    Chart("Choices that took another round", {"share": "moe/overflow_fraction"}, " %", None, 100),
    _one("Experts that nobody chose", "moe/dead_fraction", " %", None, 100),
)
SPEED = (
    Chart("Tokens per second", {"all": "perf/tokens_per_second", "learned": "perf/trainable_tokens_per_second"}),
    _one("MFU", "perf/mfu", " %", None, 100),
    Chart("Time of a step", {"all": "perf/step_seconds", "waiting for data": "perf/data_wait_seconds"}, " s", False),
    _one("Time of a save", "checkpoint/seconds", " s"),
)
DATA = (
    Chart("Epochs of each source", {"": "data/*/epoch"}),
    _one("Phase of the data", "data/phase"),
)
# shown elsewhere, or another form of what is shown
_ELSEWHERE = re.compile(
    r"train/(tokens|learned_tokens|pairs)|rollback/.*|data/.*/(rows|tokens|bytes)|eval/(perplexity|pairs)"
    r"|eval/[^/]+/.*|eval/rewards/margins|checkpoint/bytes"
    r"|perf/(compile_seconds|tokens_per_second_per_device|tflops_per_device)"
)


def draw(chart: Chart, runs: Sequence[Run], axes: Axes, smooth: int) -> list[str]:
    """One chart of one run; of several one for each line, with a line for each run. None where nothing was measured."""
    found = {label: [run.history.curves.get(key) for run in runs] for label, key in _metrics(chart, runs).items()}
    found = {label: curves for label, curves in found.items() if any(map(_says_something, curves))}
    if len(runs) == 1:
        names = {label: runs[0].name if label == chart.title.lower() else label for label in found}
        series = [_series(names[label], one, chart, runs[0], axes, smooth) for label, (one,) in found.items() if one]
        picture = lines(chart.title, series, unit=chart.unit, log=chart.log, marks=marks(runs[0], axes))
        return [picture] if series else []
    return [
        lines(
            chart.title if label == chart.title.lower() else f"{chart.title}: {label}",
            [_series(r.name, curve, chart, r, axes, smooth) for r, curve in zip(runs, curves, strict=True) if curve],
            unit=chart.unit, log=chart.log,
        )
        for label, curves in found.items()
    ]  # fmt: skip


def others(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each metric that none of ours shows, of another version or of a plug-in."""
    charts = (*LEARNING, *OPTIMIZER, *ROUTER, *SPEED, *DATA)
    ours = {key for chart in charts for key in _metrics(chart, runs).values()}
    keys = sorted({key for run in runs for key in run.history.curves} - ours)
    return [Chart(key, {key.lower(): key}) for key in keys if not _ELSEWHERE.fullmatch(key)]


def always_zero(run: Run) -> list[str]:
    """Metrics whose charts are left out, as there is nothing to see."""
    return sorted(key for key, curve in run.history.curves.items() if not _says_something(curve))


def marks(run: Run, axes: Axes) -> list[Mark]:
    """Restarts, steps that were lost with them, and roll backs."""
    found = []
    for before, attempt in zip(run.attempts, run.attempts[1:], strict=False):
        code, number = before.get("exit_code"), attempt.get("attempt", "?")
        why = f"exit {code}" if code in [*ExitCode] else "killed"
        places = axes.at(run, [attempt["first_step"]]) | axes.times(run, [attempt["job_start_time"]])
        found.append(Mark(f"attempt {number} begins ({why} before)", _each(places)))
    for index, first, last in lost_steps(run.attempts):
        begins, ends = (axes.at(run, [step]) for step in (first, last))
        # an attempt's lost steps were done before the next one began
        ends |= axes.times(run, [run.attempts[index]["job_end_time"]])
        # the clock of the steps is that of the second time
        begins = {kind: [min(at + ends[kind])] for kind, at in begins.items()}
        text = f"steps {first + 1} to {last} were lost and done again"
        found.append(Mark(text, _each(begins), _each(ends)))
    for line in run.history.rollbacks:
        said = f"step {line['rollback/step']} was not finite (loss {line.get('rollback/loss')})"
        found.append(Mark(f"{said}: back to step {line['step'] - 1}", _each(axes.at(run, [line["step"]]))))
    return found


def _each(places: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {kind: at for kind, (at,) in places.items()}


def _metrics(chart: Chart, runs: Sequence[Run]) -> dict[str, str]:
    """Label -> metric, with those that a * stands for."""
    keys, found = dict.fromkeys(key for run in runs for key in run.history.curves), dict[str, str]()
    for label, metric in chart.lines.items():
        if "*" not in metric:
            found[label] = metric
            continue
        pattern = re.compile(re.escape(metric).replace(r"\*", "([^/]+)") + r"(,.+(?<!_stderr))?")
        found |= {match[1] + (match[2] or ""): match[0] for match in map(pattern.fullmatch, keys) if match}
    return found


def _says_something(curve: Sequence[Point] | None) -> bool:
    return bool(curve) and any(point.low or point.high for point in curve or ())


def _series(name: str, curve: Sequence[Point], chart: Chart, run: Run, axes: Axes, smooth: int) -> Series:
    points = smoothed(curve, smooth)
    axis = axes.name(run, [point.step for point in points])
    middle, low, high = ([chart.times * point[i] for point in points] for i in (1, 2, 3))
    if all(point.low == point.high or math.isnan(point.low) for point in points):
        return Series(name, axis, middle)
    return Series(name, axis, middle, low, high)


def drawn(charts: Sequence[Chart], runs: Sequence[Run], axes: Axes, smooth: int) -> Iterator[str]:
    """All of them that there is something to draw in."""
    for chart in charts:
        yield from draw(chart, runs, axes, smooth)
