"""Evaluation on held-out data: sums over each validation source, then one division, for documents and for pairs."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.data.loader import EvalSource
from mixtral_jax.train.checkpoints.best import Best
from mixtral_jax.train.console import Console, eval_lines, pair_lines
from mixtral_jax.train.hooks.moment import Moment
from mixtral_jax.train.hooks.sinks import Writer
from mixtral_jax.train.objective import EvalSums
from mixtral_jax.train.optimizer import Params
from mixtral_jax.train.preference.objective import PairSums


class EvalConfig(FrozenConfig):
    """Loss, perplexity and bits per byte of each validation source; also measured after the last step."""

    every: int | None = Field(100, gt=0, description="steps between evaluations; null: only after the last")
    batches: int | None = Field(None, gt=0, description="batches per source; null: its whole text")
    batch_size: int | None = Field(None, gt=0, description="sequences per batch; null: micro_batch_size")


class Measure(NamedTuple):
    """What an evaluation makes of the sums of an objective over each source."""

    metrics: Callable[[Mapping[str, Any], Mapping[str, EvalSource]], dict[str, float]]  # eval/* and eval/<source>/*
    show: Callable[[int, Mapping[str, float], list[str], Callable[[str], None]], None]


class Evaluate:
    """The hook: measures every source, and tells `best`."""

    def __init__(
        self, config: EvalConfig, sources: Mapping[str, EvalSource], eval_step: Callable[[Params, Any], Any],
        put: Callable[[Any], Any], writer: Writer, console: Console, *, measure: Measure, best: Best,
    ):  # fmt: skip
        self._config, self._sources, self._eval_step, self._put = config, sources, eval_step, put
        self._writer, self._console, self._measure, self._best = writer, console, measure, best

    def due(self, step: int, last: bool) -> bool:
        return bool(self._sources) and (last or (self._config.every is not None and step % self._config.every == 0))

    def run(self, moment: Moment) -> None:
        metrics = self.measure(moment.state.params)
        self._writer.write(moment.step, metrics)
        self._measure.show(moment.step, metrics, list(self._sources), self._console.say)
        self._best.judge(moment.step, metrics)

    def measure(self, params: Params) -> dict[str, float]:
        """eval/* and eval/<source>/* of these parameters; nothing is written. Empty without sources."""
        if not self._sources:
            return {}

        def ask(batch: Any) -> Any:
            return self._eval_step(params, self._put(batch))

        sums = {name: add_up(ask, source, self._config.batches) for name, source in self._sources.items()}
        return self._measure.metrics(sums, self._sources)


def add_up(ask: Callable[[Any], Any], source: EvalSource, batches: int | None) -> Any:
    """The sums that `ask` makes of the first batches of a source (None: of all), added in fp64."""
    sums = [jax.device_get(ask(batch)) for batch in itertools.islice(source, batches)]
    return jax.tree.map(lambda *column: np.sum(column, dtype=np.float64), *sums)


class _Measured(NamedTuple):
    """Sums over documents or answers."""

    sums: EvalSums
    utf8_bytes: Any


def token_metrics(sums: Mapping[str, EvalSums], sources: Mapping[str, EvalSource]) -> dict[str, float]:
    """Loss, perplexity, accuracy and, of documents, bits per byte: of all sources together, and of each."""
    measured = {}
    for name, own in sums.items():
        # part of the text only: its bytes in proportion to the targets
        share = own.weight / max(sources[name].targets, 1)
        measured[name] = _Measured(own, sources[name].text_bytes * share)
    return _each(measured, _ratios)


def pair_metrics(sums: Mapping[str, PairSums], sources: Mapping[str, EvalSource]) -> dict[str, float]:
    """Loss, reward accuracy and margin: of the pairs of all sources together, and of each."""
    del sources
    return _each(sums, _pair_ratios)


TOKENS, PAIRS = Measure(token_metrics, eval_lines), Measure(pair_metrics, pair_lines)


def _each(sums: Mapping[str, Any], ratios: Callable[[Any], dict[str, float]]) -> dict[str, float]:
    total = jax.tree.map(lambda *column: sum(column), *sums.values())
    return {
        f"eval/{prefix}{key}": value
        for prefix, own in {"": total, **{f"{name}/": own for name, own in sums.items()}}.items()
        for key, value in ratios(own).items()
    }


def _ratios(measured: _Measured) -> dict[str, float]:
    nll, weight, correct, _ = (float(x) for x in measured.sums)
    loss = nll / max(weight, 1.0)
    ratios = {"loss": loss, "perplexity": perplexity(loss), "accuracy": correct / max(weight, 1.0)}
    if measured.utf8_bytes:  # 0: only answers are predicted, there is no text that bits would be of
        ratios["bits_per_byte"] = bits_per_byte(nll, float(measured.utf8_bytes))
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
