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


class EvalConfig(FrozenConfig):
    """Loss, perplexity and bits per byte of each validation source; also measured after the last step."""

    every: int | None = Field(100, gt=0, description="steps between evaluations; null: only after the last")
    batches: int | None = Field(
        None, gt=0, description="batches per source, their rows spread evenly over it; null: its whole text"
    )
    batch_size: int | None = Field(None, gt=0, description="sequences per batch; null: micro_batch_size")


class BrokenOff(Exception):
    """What asks the run to stop, in the middle of an evaluation."""


class Evaluate:
    """The hook: measures every source, and tells `best`."""

    def __init__(
        self, config: EvalConfig, sources: Mapping[str, EvalSource], eval_step: Callable[[Params, Any], Any],
        put: Callable[[Any], Any], writer: Writer, console: Console, best: Best, phases: Phases | None = None,
        check: Callable[[], None] = lambda: None, owed: bool = False,
    ):  # fmt: skip
        """Ahead of each batch `check` may raise: then nothing is written, and the evaluation is `owed`."""
        self._phases, self._check, self.owed = phases or Phases(), check, owed
        self._first = Phase.FIRST_BATCH
        self._config, self._sources, self._eval_step, self._put = config, sources, eval_step, put
        self._writer, self._console, self._best = writer, console, best

    def due(self, step: int, last: bool) -> bool:
        return bool(self._sources) and (last or (self._config.every is not None and step % self._config.every == 0))

    def run(self, moment: Moment) -> None:
        self.owed = True
        metrics = self.measure(moment.state.params, self._check)
        self._writer.write(moment.step, metrics)
        self._console.say(eval_lines(moment.step, metrics, list(self._sources)))
        self._best.judge(moment.step, metrics, moment.last)
        self.owed = False

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
