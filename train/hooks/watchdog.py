"""A run in which nothing moves any more ends: exit 124."""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.train.phases import Phases

Limit = Literal["auto"] | Annotated[float, Field(gt=0)] | None
# auto: so many times log.watchdog_seconds, but no less than so many seconds
_AUTO = {"prepare": (20, 86400.0), "first_step": (5, 0.0), "evaluation_batch": (1, 0.0)}
_SLOW = (20, 120.0)
_DUMP_SECONDS = 5.0


class PhaseSeconds(FrozenConfig):
    """Exit 124 where one of these takes longer than so many seconds; null: never.

    auto is 20 times log.watchdog_seconds but no less than 120 s, or null where that is null. Of prepare it is no less
    than a day, of first_step 5 times, of evaluation_batch once log.watchdog_seconds.
    """

    prepare: Limit = Field("auto", description="data, weights, all before the first step that is none of the others")
    restore: Limit = Field("auto", description="the read of a checkpoint")
    compile: Limit = Field("auto", description="of the training step, and the first batch of an evaluation")
    first_step: Limit = Field("auto", description="the first step of each start")
    evaluation_batch: Limit = Field("auto", description="one batch of an evaluation, which may have any number")
    sampling: Limit = Field("auto", description="all the samples after a step")
    save: Limit = Field("auto", description="that part of a save for which the steps wait")
    last_save: Limit = Field("auto", description="a save that is waited for to its end")


def limits_of(step: float | None, phase_seconds: PhaseSeconds) -> dict[str, float]:
    """Seconds by the name of the limit, where there is one; `step` is log.watchdog_seconds."""
    limits: dict[str, float | None] = {"step": step}
    for name, limit in phase_seconds.model_dump().items():
        times, least = _AUTO.get(name, _SLOW)
        limits[name] = limit if limit != "auto" else None if step is None else max(times * step, least)
    return {name: limit for name, limit in limits.items() if limit is not None}


class Watchdog:
    """Bites where nothing has moved for longer than the phase of that moment may take."""

    def __init__(self, limits: Mapping[str, float], phases: Phases, bite: Callable[[str], None]):
        """`bite` ends the process; it is told why."""
        self._limits, self._phases, self._bite = limits, phases, bite
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(min(self._limits.values(), default=20.0) / 4, 5.0)):
            phase, idle, *_ = self._phases.read()
            limit = self._limits.get(phase.limit)
            if limit is not None and idle > limit:
                dump = threading.Thread(target=_dump, daemon=True)
                dump.start()
                dump.join(_DUMP_SECONDS)  # its reader may be what hangs
                key = "watchdog_seconds" if phase.limit == "step" else f"phase_seconds.{phase.limit}"
                what = "no step finished" if phase.limit == "step" else f"{phase.state}: nothing moved"
                self._bite(f"{what} for {limit:g} s (log.{key})")


def _dump() -> None:
    """Where every thread stands; faulthandler would keep all others from running while it writes."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for number, frame in sys._current_frames().items():
        with contextlib.suppress(OSError, ValueError):  # a stderr that is gone
            print(f"Thread {names.get(number, number)}:", *traceback.format_stack(frame), file=sys.stderr)
