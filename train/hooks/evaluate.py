"""Evaluation on held-out data: sums over each validation source, then one division, for documents and for pairs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.data.loader import EvalSource
from mixtral_jax.train.checkpoints import Best
from mixtral_jax.train.console import Console, eval_lines
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.hooks.sinks import Writer
from mixtral_jax.train.objective import EvalSums
from mixtral_jax.train.optimizer import Params
from mixtral_jax.train.phases import Phase, Phases
from mixtral_jax.train.preference import PairSums


class TasksConfig(FrozenConfig):
    """Benchmarks of lm-evaluation-harness on the model as it learns, and after the last step (docs/evaluation.md)."""

    names: tuple[str, ...] = Field(
        min_length=1, description="tasks, groups or tags of the harness; local_* are those on files of data_dir"
    )
    every: int | None = Field(1000, gt=0, description="steps between them; null: only after the last")
    limit: int | None = Field(None, gt=0, description="documents of each task; null: all")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question; null: as the task says")
    data_dir: str | None = Field(
        None, description="where the files of local tasks are; null: as the variable MIXTRAL_JAX_DATA says"
    )
    include: tuple[str, ...] = Field((), description="directories of more task files")
    apply_chat_template: bool = Field(False, description="questions are a user's messages, in data.template")
    allow_code: bool = Field(False, description="tasks may run what the model writes")


class EvalConfig(FrozenConfig):
    """Loss, perplexity and bits per byte of each validation source; also measured after the last step."""

    every: int | None = Field(100, gt=0, description="steps between evaluations; null: only after the last")
    batches: int | None = Field(
        None, gt=0, description="batches per source, their rows spread evenly over it; null: its whole text"
    )
    batch_size: int | None = Field(None, gt=0, description="sequences per batch; null: micro_batch_size")
    tasks: TasksConfig | None = Field(None, description="benchmarks beside the loss; null: none")


class BrokenOff(Exception):
    """What asks the run to stop, in the middle of an evaluation."""


Benchmark = Callable[[Params, int, Callable[[], None]], Mapping[str, float]]


class Evaluate:
    """The hook: measures every source, and tells `best`; runs the benchmarks, where there are some."""

    def __init__(
        self, config: EvalConfig, sources: Mapping[str, EvalSource], eval_step: Callable[[Params, Any], Any],
        put: Callable[[Any], Any], writer: Writer, console: Console, best: Best, phases: Phases | None = None,
        check: Callable[[], None] = lambda: None, owed: bool = False, benchmark: Benchmark | None = None,
    ):  # fmt: skip
        """At each batch `check` may raise: then nothing is written, and the evaluation is `owed`.

        `benchmark` gives eval/<task>/<metric> of parameters behind a step, and calls what it is given at each batch.
        """
        self._phases, self._check, self.owed = phases or Phases(), check, owed
        self._first = Phase.FIRST_BATCH
        self._config, self._sources, self._eval_step, self._put = config, sources, eval_step, put
        self._writer, self._console, self._best, self._benchmark = writer, console, best, benchmark

    def due(self, step: int, last: bool) -> bool:
        return self._loss_due(step, last) or self._tasks_due(step, last)

    def run(self, moment: Moment) -> None:
        self.owed = True
        step, params = moment.step, moment.state.params
        metrics = self.measure(params, self._check) if self._loss_due(step, moment.last) else {}
        scores = self._benchmark_of(params, step) if self._tasks_due(step, moment.last) else {}
        if metrics or scores:  # else what is owed is due no more, since the file has changed
            self._writer.write(step, {**metrics, **scores})
        if metrics:
            self._console.say(eval_lines(step, metrics, list(self._sources)))
            self._best.judge(step, metrics, moment.last)
        self.owed = False

    def _loss_due(self, step: int, last: bool) -> bool:
        return bool(self._sources) and _is_due(self._config.every, step, last)

    def _tasks_due(self, step: int, last: bool) -> bool:
        return self._config.tasks is not None and _is_due(self._config.tasks.every, step, last)

    def _benchmark_of(self, params: Params, step: int) -> Mapping[str, float]:
        assert self._benchmark is not None

        def check() -> None:
            self._phases.beat()
            self._check()

        with self._phases.during(Phase.FIRST_BATCH):  # any may be the first of its shape
            try:
                return self._benchmark(params, step, check)
            except FloatingPointError as error:  # on all processes alike; whether training goes on, its step says
                self._console.say(f"  no scores of tasks: {error}")
                return {}

    def measure(self, params: Params, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """eval/* and eval/<source>/* of these parameters; nothing is written. Empty without sources."""

        def ask(batch: Any) -> Any:
            check()
            with self._phases.during(self._first):
                sums = jax.device_get(self._eval_step(params, self._put(batch)))
            self._first = Phase.EVALUATING  # compiled
            return sums

        with self._phases.during(Phase.EVALUATING):
            return measure_sources(ask, self._sources)


def _is_due(every: int | None, step: int, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def measure_sources(ask: Callable[[Any], Any], sources: Mapping[str, EvalSource]) -> dict[str, float]:
    """eval/* and eval/<source>/* of the sums that `ask` makes of the batches of each source."""
    sums = {}
    for name, source in sources.items():
        found = [jax.device_get(ask(batch)) for batch in source]
        sums[name] = jax.tree.map(lambda *column: np.sum(column, dtype=np.float64), *found)
    return metrics_of(sums, sources) if sums else {}


def metrics_of(sums: Mapping[str, EvalSums | PairSums], sources: Mapping[str, EvalSource]) -> dict[str, float]:
    """Ratios of the sums over documents, answers or pairs: of all sources together, and of each."""
    measured = {f"{name}/": (own, sources[name].text_bytes) for name, own in sums.items()}
    together = jax.tree.map(lambda *column: sum(column), *measured.values())
    return {
        f"eval/{prefix}{key}": value
        for prefix, (own, utf8_bytes) in {"": together, **measured}.items()
        for key, value in (_pair_ratios(own) if isinstance(own, PairSums) else _ratios(own, utf8_bytes)).items()
    }


def _ratios(sums: EvalSums, utf8_bytes: float) -> dict[str, float]:
    nll, weight, correct, _ = (float(x) for x in sums)
    loss = nll / max(weight, 1.0)
    ratios = {"loss": loss, "perplexity": perplexity(loss), "accuracy": correct / max(weight, 1.0)}
    if utf8_bytes:  # 0: only answers are predicted, there is no text that bits would be of
        ratios["bits_per_byte"] = bits_per_byte(nll, float(utf8_bytes))
    return ratios


def _pair_ratios(sums: PairSums) -> dict[str, float]:
    pairs = max(float(sums.pairs), 1.0)
    return {
        "loss": float(sums.loss) / pairs,
        "rewards/accuracies": float(sums.accuracies) / pairs,
        "rewards/margins": float(sums.margins) / pairs,
        "pairs": float(sums.pairs),
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(nll_nats: float, utf8_bytes: float) -> float:
    """Sum of nll over all predicted tokens / (ln 2 * UTF-8 bytes of the text) (NUMERICS D7)."""
    return nll_nats / (math.log(2) * utf8_bytes)
