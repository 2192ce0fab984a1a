"""Evaluation on held-out pairs: loss, reward accuracy and margin of each validation source, and of all together."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from data.loader import EvalSource
from train.console import Console
from train.hooks import EvalConfig, Moment
from train.metrics import Writer
from train.optimizer import Params
from train.preference_objective import PairSums


class EvaluatePairs:
    """eval/{loss,rewards/accuracies,rewards/margins}, and eval/<source>/*."""

    def __init__(
        self, config: EvalConfig, sources: Mapping[str, EvalSource], eval_step: Callable[[Params, Any], PairSums],
        put: Callable[[Any], Any], writer: Writer, console: Console,
    ):  # fmt: skip
        self._config, self._sources, self._eval_step, self._put = config, sources, eval_step, put
        self._writer, self._console = writer, console

    def due(self, step: int, last: bool) -> bool:
        return bool(self._sources) and (last or (self._config.every is not None and step % self._config.every == 0))

    def run(self, moment: Moment) -> None:
        measured = {name: self._measure(moment.state.params, source) for name, source in self._sources.items()}
        metrics = pair_metrics(measured)
        self._writer.write(moment.step, metrics)
        accuracy = "rewards/accuracies"
        self._console.say(
            f"eval at step {moment.step}: loss {metrics['eval/loss']:.4f}, "
            f"chosen before rejected {metrics[f'eval/{accuracy}']:.1%} of {sum(m.pairs for m in measured.values()):.0f}"
        )
        self._console.say("  " + " | ".join(f"{n} {metrics[f'eval/{n}/{accuracy}']:.1%}" for n in measured))

    def _measure(self, params: Params, source: EvalSource) -> PairSums:
        batches = itertools.islice(source, self._config.batches)
        sums = [jax.device_get(self._eval_step(params, self._put(batch))) for batch in batches]
        return jax.tree.map(lambda *column: np.sum(column, dtype=np.float64), *sums)


def pair_metrics(measured: Mapping[str, PairSums]) -> dict[str, float]:
    """Sums over pairs, then one division."""
    total = jax.tree.map(lambda *column: sum(column), *measured.values())
    metrics: dict[str, float] = {}
    for prefix, sums in {"eval/": total, **{f"eval/{name}/": sums for name, sums in measured.items()}}.items():
        pairs = max(float(sums.pairs), 1.0)
        metrics[f"{prefix}loss"] = float(sums.loss) / pairs
        metrics[f"{prefix}rewards/accuracies"] = float(sums.accuracies) / pairs
        metrics[f"{prefix}rewards/margins"] = float(sums.margins) / pairs
    return metrics
