"""The best evaluation of a run: which checkpoint it belongs to, and when waiting for a better one has no point."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from etils import epath
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.data.records import is_remote

LINK = "best"  # checkpoints/best stands for the best step
_NOTE = "evaluated.json"
# What is measured on each validation source, by the kind of its examples -> whether larger is better.
MEASURED: Mapping[str, Mapping[str, bool]] = {
    "text": {"loss": False, "perplexity": False, "accuracy": True, "bits_per_byte": False},
    "chat": {"loss": False, "perplexity": False, "accuracy": True},
    "preference": {"loss": False, "rewards/accuracies": True, "rewards/margins": True},
}


class EarlyStoppingConfig(FrozenConfig):
    """Keeps the checkpoint with the best evaluation, and ends a run that no longer gets better.

    Improvements are saved, beside the other checkpoints at most one in `checkpoint.every` steps.
    """

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


def comparable(meta: Mapping[str, Any], now: Mapping[str, Any], say: Callable[[str], Any]) -> Mapping[str, Any] | None:
    """The best evaluation that a checkpoint knows, if a configuration of now measures what that one did."""
    best, (then, own) = meta.get("best"), map(_measured, (meta.get("config", {}), now))
    # what an earlier version did not say is as it was
    if best is None or now["early_stopping"] is None or all(then.get(key, own[key]) == own[key] for key in own):
        return best
    say("early_stopping begins anew: what is evaluated, or how, is not what it was")
    return None


def _measured(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the numbers, a part each; directories may move, but for those of patterns."""
    data, sources = config.get("data", {}), config.get("data", {}).get("validation") or ()
    found = {"seq_len": config.get("seq_len"), "batches": config.get("eval", {}).get("batches")}
    found |= {"sources": [source["name"] for source in sources]}
    found |= {key: data[key] for key in ("examples", "train_on", "template") if key in data}
    found |= {f"dpo.{key}": value for key, value in (config.get("dpo") or {}).items()}
    for source in sources:
        paths = [source["path"]] if isinstance(source["path"], str) else source["path"]
        ends = [PurePath(path).parts[-2 if set("*?[") & set(path) else -1 :] for path in paths]
        own = {key: value for key, value in source.items() if key != "weight"} | {"path": ends}
        found |= {f"{source['name']}.{key}": value for key, value in own.items()}
    return found


class Best:
    """The best evaluation so far. Without a config it never has one."""

    def __init__(
        self, config: EarlyStoppingConfig | None, record: Mapping[str, Any] | None = None, every: int | None = None
    ):
        """`record` is what a checkpoint says; that of another metric counts for nothing.

        Between the checkpoints of each `every` steps an improvement is saved once in as many: while a run gets better
        at every evaluation, the next one would replace it. None: each of them.
        """
        self._config, self._every = config, every
        self._record: dict[str, Any] | None = None
        self._named: list[dict[str, Any]] = [{"value": None, "step": None}]  # each that was the best, in order
        if config is not None:
            # patience compares with `mark`, and has waited for so many evaluations
            self._record = {"metric": config.metric, "step": None, "value": None, "mark": None, "waited": 0}
            if record is not None and record["metric"] == config.metric:
                self._record |= record
                self._named.append({key: record[key] for key in ("value", "step")})

    @property
    def record(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it, which may be written while evaluations go on: a copy."""
        return None if self._record is None else dict(self._record)

    @property
    def step(self) -> int | None:
        """That of the best evaluation."""
        return None if self._record is None else self._record["step"]

    def judge(self, step: int, metrics: Mapping[str, float], saved: bool = False) -> None:
        """Take note of an evaluation, of a step that is `saved` anyway. One that is not a number is no improvement."""
        if self._config is None or self._record is None:
            return
        value = float(metrics[self._config.metric])
        every, before = self._every, self.step
        often = every is not None and step % every and before is not None and step - before < every
        if (saved or not often) and self._gain(value, self._record["value"]) > 0:
            self._named.append({"value": value, "step": step})
            self._record |= self._named[-1]
        if self._gain(value, self._record["mark"]) > self._config.min_delta:
            self._record |= {"mark": value, "waited": 0}
        else:
            self._record["waited"] += 1

    def forget(self, step: int | None) -> None:
        """The checkpoint of this step could not be made: where it was to be the best, the last one made still is."""
        if self._record is not None and step is not None:
            self._named = [named for named in self._named if named["step"] != step]
            self._record |= self._named[-1]

    def _gain(self, value: float, before: float | None) -> float:
        """How much better; infinite where there was nothing."""
        assert self._config is not None
        if before is None:
            return -math.inf if math.isnan(value) else math.inf
        directions = {what: goes_up for kind in MEASURED.values() for what, goes_up in kind.items()}
        larger = any(goes_up and self._config.metric.endswith(f"/{what}") for what, goes_up in directions.items())
        return value - before if larger else before - value

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        if self._config is None or self._record is None or self._config.patience is None:
            return False
        return self._record["waited"] >= self._config.patience

    def __str__(self) -> str:
        """As a part of a sentence; empty where there is none."""
        if self._record is None or self.step is None:
            return ""
        better = self._gain(self._record["mark"], self._record["value"]) > 0
        unsaved = f" ({self._record['mark']:.4f} was not saved)" * better
        value = f"{self._record['value']:.4f}"
        return f"the best {self._record['metric']}, {value}, is that of checkpoint {self.step}{unsaved}"

    @property
    def why_stopped(self) -> str:
        """The reason that STATUS gives."""
        assert self._record is not None
        waited = self._record["waited"]
        return f"{self._record['metric']} has not improved for {waited} evaluation{'s' * (waited != 1)}; {self}"


def note_evaluation(checkpoint: epath.PathLike, best: Mapping[str, Any] | None) -> None:
    """Beside a checkpoint that was saved amid its evaluation: it is made up for, and this is the best since then."""
    if (place := epath.Path(checkpoint)).exists():
        (place / _NOTE).write_text(json.dumps({"evaluation_owed": False, "best": best}))


def noted_evaluation(checkpoint: epath.PathLike) -> dict[str, Any]:
    """What replaces the same keys of the checkpoint's `meta`."""
    note = epath.Path(checkpoint) / _NOTE
    try:
        return dict(json.loads(note.read_text())) if note.exists() else {}
    except ValueError:  # cut off
        return {}


def point_to(directory: epath.PathLike, step: int | None) -> None:
    """Make <directory>/best stand for a step: a link, and on cloud storage a file with its number. None removes it."""
    root = epath.Path(directory)
    link, temporary = root / LINK, root / f"{LINK}.tmp"
    if step is None:
        link.unlink(missing_ok=True)
    elif is_remote(str(directory)):
        link.write_text(f"{step}\n")
    else:
        temporary.unlink(missing_ok=True)
        os.symlink(str(step), temporary)
        os.replace(temporary, link)
