"""The page of one run, and that of several over each other."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral_jax.train.console import age, clock
from mixtral_jax.train.errors import ExitCode
from mixtral_jax.train.pages import Section, choose, details, escape, grid, heat_map, page, stacked, table, tiles
from mixtral_jax.train.report.charts import (
    DATA,
    LEARNING,
    OPTIMIZER,
    ROUTER,
    SPEED,
    Chart,
    always_zero,
    drawn,
    others,
)
from mixtral_jax.train.report.evaluations import evaluations
from mixtral_jax.train.report.experts import Loads
from mixtral_jax.train.report.run import Axes, Run

_LAYERS_AT_ONCE = 8
_LONGEST_SAMPLE = 600
_STRIP = 300  # pixels: three in a row of the page
_CURVES = (
    "A line is the median of a stretch of steps, its band goes from the least to the greatest value there; what is not "
    "finite is marked at the edge (× is NaN). "
)
_MARKS = "Dotted lines are restarts and roll backs, shaded steps were lost with one and done again."


def render(runs: Sequence[Run], *, smooth: int = 1, script: str = "") -> str:
    """HTML of one file.

    Args:
        smooth: points over which lines are averaged.
        script: of the page's own, see `pages.page`.
    """
    axes, single = Axes(runs), len(runs) == 1

    def curves(charts: Sequence[Chart], least: int = 340) -> str:
        found = [*drawn(charts, runs, axes, smooth)]
        return f'<div style="--least: {least}px">{grid(found)}</div>' if found else ""

    one = runs[0]
    sections = [
        _summary(one) if single else _comparison(runs),
        Section("Learning", _CURVES + _MARKS * single, [curves(LEARNING, least=480)]),
        *([_evaluations(one), _samples(one)] if single else []),
        Section("Optimizer", "What the updates were made with.", [curves(OPTIMIZER)]),
        Section(
            "Experts",
            "Where the router sent the tokens: means over layers, then the load of each expert (1 is an even share).",
            [curves(ROUTER), *([_strips(one.loads)] if single and one.loads else [])],
        ),
        Section("Speed", "Of training steps alone: evaluations, samples and saves are left out.", [curves(SPEED)]),
        _time(runs),
        Section("Data", "How often each source has been read.", [curves(DATA)]),
        *((_settings(one), _log(one)) if single else (_differences(runs),)),
        _rest(runs, curves(others(runs))),
    ]
    when = f"{_date(time.time())} UTC"
    said = f"{one.settings.get('stage', 'run')}, seed {one.settings.get('seed', '?')}; " if single else ""
    return page(
        one.name if single else f"{len(runs)} runs",
        [section for section in sections if any(section.html)],
        subtitle=f"{said}what its files said on {when}" if single else f"what their files said on {when}",
        axes=axes.places,
        script=script,
    )


def _summary(run: Run) -> Section:
    stands, last = run.standing, run.history.last
    shown: dict[str, Any] = {"state": stands.state, "step": f"{_or_dash(stands.step)} of {_or_dash(stands.steps)}"}
    named = {
        "training loss": "train/loss", "held-out loss": "eval/loss", "held-out bits per byte": "eval/bits_per_byte",
        "chosen before rejected": "eval/rewards/accuracies", "tokens": "train/tokens",
        "tokens per second": "perf/tokens_per_second",
    }  # fmt: skip
    shown |= {label: last[key][1] for label, key in named.items() if key in last}
    if "perf/mfu" in last:
        shown["MFU"] = f"{last['perf/mfu'][1]:.1%}"
    if math.isfinite(run.seconds):
        shown["time"] = age(run.seconds)
    if run.book.goodput is not None:
        shown["goodput"] = f"{run.book.goodput:.1%}"
    return Section("How it stands", _ending(run), [tiles(shown)])


def _ending(run: Run) -> str:
    if run.standing.reason:
        return f"{run.standing.reason}."
    return "" if run.standing.age is None else f"STATUS was written {age(run.standing.age)} before this page."


def _comparison(runs: Sequence[Run]) -> Section:
    """A row for each run, the best first."""
    names = {
        "held-out loss": "eval/loss", "bits per byte": "eval/bits_per_byte",
        "chosen first": "eval/rewards/accuracies", "training loss": "train/loss", "tokens/s": "perf/tokens_per_second",
    }  # fmt: skip
    names = {label: key for label, key in names.items() if any(key in run.history.last for run in runs)}
    differing = _differing([run.settings for run in runs])

    def row(run: Run) -> list[str | float | None]:
        values = [run.history.last.get(key, (0, None))[1] for key in names.values()]
        settings = [value if isinstance(value := run.settings.get(key), float) else _shown(value) for key in differing]
        return [run.name, *settings, *values, run.standing.state, run.standing.step]

    def rank(run: Run) -> tuple[float, float]:
        losses = (run.history.last.get(key, (0, math.inf))[1] for key in ("eval/loss", "train/loss"))
        first, second = (math.inf if math.isnan(loss) else loss for loss in losses)
        return first, second

    columns = ["run", *differing, *names, "state", "step"]
    lead = "The settings that differ, and what each run measured last; the lowest held-out loss first."
    return Section("The runs", lead, [table(columns, [row(run) for run in sorted(runs, key=rank)], sortable=True)])


def _evaluations(run: Run) -> Section:
    lead = "What was measured last of each source and task, and the tables of separate evaluations."
    return Section("Evaluations", lead, [*evaluations(run.place, run.history.last)])


def _samples(run: Run) -> Section:
    """Prompts down, steps across."""
    steps = sorted(run.samples)
    prompts = dict.fromkeys(prompt for step in steps for prompt in run.samples[step])
    texts = [[prompt, *(run.samples[step].get(prompt, "")[:_LONGEST_SAMPLE] for step in steps)] for prompt in prompts]
    lead = "What the model wrote behind the same beginnings, from left to right as it learned."
    html = [table(["beginning", *(f"step {step}" for step in steps)], texts)] if steps else []
    return Section("Samples", lead, html)


def _strips(loads: Loads) -> str:
    """A strip for each layer, from none to twice an even share; where there are many layers one at a time."""
    layers, experts, _ = loads.load_LES.shape
    strips = {
        f"{layer}": heat_map(
            f"Layer {layer}: load of its experts", load_ES, rows=range(experts), columns=loads.steps,
            names=("expert", "step"), center=1.0, limits=(0, 2), width=_STRIP,
        )
        for layer, load_ES in enumerate(loads.load_LES)
    }  # fmt: skip
    if layers <= _LAYERS_AT_ONCE:
        return grid([*strips.values()])
    busiest = heat_map(
        "Load of the busiest expert of each layer", loads.load_LES.max(axis=1), rows=range(layers),
        columns=loads.steps, names=("layer", "step"),
    )  # fmt: skip
    return busiest + choose("layer", strips)


def _time(runs: Sequence[Run]) -> Section:
    """Where it went, and of one run what each attempt did."""
    spent = {
        run.name: {kind.replace("_", " "): seconds for kind, seconds in run.book.seconds.items() if seconds >= 0.05}
        for run in runs
        if run.attempts
    }
    lead = "Of all the time since the first start, down time too; goodput is the share of steps that count."
    html = [stacked("", spent, unit=" s")] if any(spent.values()) else []
    if len(runs) == 1 and runs[0].attempts:
        html.append(_attempts(runs[0]))
    return Section("Where the time went", lead, html)


def _attempts(run: Run) -> str:
    def row(attempt: dict[str, Any]) -> list[str | float | None]:
        began, ended, code = attempt["job_start_time"], attempt["job_end_time"], attempt.get("exit_code")
        end = (
            f"{code}: {ExitCode(code).meaning}" if isinstance(code, int) and code in [*ExitCode] else "no end was noted"
        )
        return [
            str(attempt.get("attempt", "?")), _date(began), clock(ended - began), attempt["first_step"],
            attempt["step_count"], attempt.get("undone"), end, str(attempt.get("host", "")),
        ]  # fmt: skip

    columns = ["attempt", "began (UTC)", "lasted", "from step", "to step", "taken back", "exit", "machine"]
    return table(columns, [row(attempt) for attempt in run.attempts])


def _settings(run: Run) -> Section:
    """What differs from the defaults, then all, with the environment."""
    html = [_values("setting", run.changed)] if run.changed else []
    more = {"all settings": run.settings, "environment": run.environment}
    html += [details(title, _values("name", known)) for title, known in more.items() if known]
    lead = "First those that differ from their defaults." if run.changed else "All that the run had."
    return Section("Settings", lead, html)


def _values(name: str, known: Mapping[str, Any]) -> str:
    return table([name, "value"], [[key, _shown(value)] for key, value in known.items()])


def _differences(runs: Sequence[Run]) -> Section:
    html = []
    for title, known in (("setting", [r.settings for r in runs]), ("environment", [r.environment for r in runs])):
        rows = [[key, *(_shown(of.get(key)) for of in known)] for key in _differing(known)]
        html += [table([title, *(run.name for run in runs)], rows)] if rows else []
    return Section("Settings", "In what the runs differ; what all have alike is left out.", html)


def _log(run: Run) -> Section:
    return Section("Log", "Its last lines.", [f"<pre>{escape(chr(10).join(run.log))}</pre>"] if run.log else [])


def _rest(runs: Sequence[Run], charts: str) -> Section:
    zero = sorted({key for run in runs for key in always_zero(run)})
    html = [details("charts", charts)] if charts else []
    html += [f"<p>Always 0: {escape(', '.join(zero))}.</p>"] if zero else []
    return Section("Other metrics", "What has no chart above.", html)


def _differing(known: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for of in known for key in of)
    return [key for key in keys if len({_shown(of.get(key)) for of in known}) > 1]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # no clock shows it
        return "?"


def _or_dash(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
