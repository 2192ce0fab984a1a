"""The best evaluation of a run: which checkpoint it belongs to, and when waiting for a better one has no point."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from pydantic import Field

from mixtral_jax.config import FrozenConfig

LINK = "best"  # checkpoints/best stands for the best step
# What is measured on each validation source, by the kind of its examples -> whether larger is better.
MEASURED: Mapping[str, Mapping[str, bool]] = {
    "text": {"loss": False, "perplexity": False, "accuracy": True, "bits_per_byte": False},
    "chat": {"loss": False, "perplexity": False, "accuracy": True},
    "preference": {"loss": False, "rewards/accuracies": True, "rewards/margins": True},
}


class EarlyStoppingConfig(FrozenConfig):
    """Keeps the checkpoint with the best evaluation, and ends a run that no longer gets better."""

    metric: str = Field(
        "eval/loss", description="what is watched: eval/<what>, or eval/<source>/<what>; accuracies and margins go up"
    )
    patience: int | None = Field(
        3, gt=0, description="evaluations in a row without an improvement that end the run; null: it goes on"
    )
    min_delta: float = Field(0.0, ge=0, description="a smaller change is no improvement to patience")


def watching_problems(
    config: EarlyStoppingConfig, examples: str, sources: Sequence[str], every: int | None
) -> Iterator[str]:
    """A sentence where nothing of that name is measured, or only once."""
    if not sources:
        yield "early_stopping is set, but data.validation is empty: there is nothing to watch"
        return
    if every is None:
        yield "early_stopping is set, but eval.every is null: a run that is evaluated once cannot stop early"
    known = [f"eval/{prefix}{what}" for prefix in ("", *(f"{s}/" for s in sources)) for what in MEASURED[examples]]
    if config.metric not in known:
        yield f"early_stopping.metric ({config.metric}) is not measured: known are {', '.join(known)}"


class Best:
    """The best evaluation so far. Without a config it never has one."""

    def __init__(self, config: EarlyStoppingConfig | None, record: Mapping[str, Any] | None = None):
        """`record` is what a checkpoint says; that of another metric counts for nothing."""
        self._config = config
        known = record if config is not None and record is not None and record["metric"] == config.metric else {}
        self.step: int | None = known.get("step")
        self._value: float | None = known.get("value")
        self._mark: float | None = known.get("mark")  # what patience compares with
        self._waited: int = known.get("waited", 0)

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation. One that is not a number is no improvement."""
        if self._config is None:
            return
        value = float(metrics[self._config.metric])
        if self._gain(value, self._value) > 0:
            self._value, self.step = value, step
        if self._gain(value, self._mark) > self._config.min_delta:
            self._mark, self._waited = value, 0
        else:
            self._waited += 1

    def _gain(self, value: float, before: float | None) -> float:
        """How much better; infinite where there was nothing."""
        if before is None:
            return -math.inf if math.isnan(value) else math.inf
        larger = any(goes_up for kind in MEASURED.values() for what, goes_up in kind.items() if self._names(what))
        return value - before if larger else before - value

    def _names(self, what: str) -> bool:
        return self._config is not None and self._config.metric.endswith(f"/{what}")

    @property
    def record(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it."""
        if self._config is None:
            return None
        metric = self._config.metric
        return {
            "metric": metric, "step": self.step, "value": self._value, "mark": self._mark, "waited": self._waited
        }  # fmt: skip

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._config is not None and self._config.patience is not None and self._waited >= self._config.patience

    def __str__(self) -> str:
        """As a part of a sentence; empty where there is none."""
        if self._config is None or self.step is None:
            return ""
        return f"the best {self._config.metric}, {self._value:.4f}, is that of checkpoint {self.step}"

    @property
    def why_stopped(self) -> str:
        """The reason that STATUS gives."""
        assert self._config is not None
        evaluations = "1 evaluation" if self._waited == 1 else f"{self._waited} evaluations"
        return f"{self._config.metric} has not improved for {evaluations}; {self}"


def point_to(directory: epath.PathLike, step: int | None) -> None:
    """Make <directory>/best stand for a step: a link, and on cloud storage a file with its number. None removes it."""
    root = epath.Path(directory)
    link, temporary = root / LINK, root / f"{LINK}.tmp"
    if step is None:
        link.unlink(missing_ok=True)
    elif "://" in str(directory):
        link.write_text(f"{step}\n")
    else:
        temporary.unlink(missing_ok=True)
        os.symlink(str(step), temporary)
        os.replace(temporary, link)
