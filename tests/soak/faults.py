"""What can happen to an attempt of a run, drawn from a seed; and the faults that are made from outside."""

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.soak.checks import whole_steps
from tests.soak.victim import PHASES

STOPS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")
CUTS = (
    "metrics.jsonl", "moe.jsonl", "attempts/goodput.jsonl", "config.yaml", "STATUS", "LEASE", "checkpoint", "cache",
    "compiled",
)  # fmt: skip
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"


@dataclass(frozen=True)
class Fault:
    """What is done to one attempt, and what is done to the run's files before it."""

    kind: str  # a signal's name, `fill`, `twin` (the same command a second time) or `none`
    phase: str = "moment"  # of victim.PHASES; `moment`: when the share `at` of an undisturbed attempt's time is over
    nth: int = 1  # event of that phase
    delay: float = 0.0  # seconds after it
    at: float = 0.0
    victims: tuple[int, ...] = (0,)  # numbers of the processes that are struck
    free_after: float | None = None  # seconds after which a full disk has room again
    clock: tuple[str, str] | None = None  # offset of the clock at the start, and from the middle on
    cut: str | None = None  # of CUTS: loses its end before the attempt
    cold: bool = False  # the prepared data are removed before the attempt

    def __str__(self) -> str:
        where = f"at {self.at:.0%} of the time" if self.phase == "moment" else f"in {self.phase} {self.nth}"
        told = self.kind if self.kind == "none" else f"{self.kind} {where}"
        if self.delay and self.phase != "moment":
            told += f" + {self.delay:.2f} s"
        told += f" on {','.join(map(str, self.victims))}" if self.victims != (0,) else ""
        told += f", room after {self.free_after:.1f} s" if self.free_after else ""
        told += f", clock {self.clock[0]} then {self.clock[1]}" if self.clock else ""
        return told + (f", {self.cut} cut" if self.cut else "") + (", no prepared data" if self.cold else "")


NONE = Fault("none")


@dataclass(frozen=True)
class Abilities:
    """What this machine allows."""

    disk: bool  # a small file system of our own
    clock: bool
    lease: bool  # the product has one

    def missing(self) -> list[str]:
        """A line for each fault that is left out."""
        told = {
            "disk": "no file system can be mounted here: no full disks",
            "clock": "libfaketime is not installed (apt-get install faketime): no stepped clocks",
            "lease": "runs have no LEASE: no second start of a run that is alive",
        }
        return [line for name, line in told.items() if not getattr(self, name)]


def draw(rng: random.Random, events: Sequence[Mapping[str, int]], can: Abilities) -> Fault:
    """The next fault; the same numbers come out of `rng` whatever the run has come to.

    `events` has how many events of each phase each process of an undisturbed run has.
    """
    processes = len(events)
    who, everybody = rng.randrange(processes), rng.random() < 0.2 and processes > 1
    counts = events[who]
    kinds = {"SIGKILL": 10, "stop": 5, "fill": 2 * can.disk, "twin": 1 * can.lease}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    kind = rng.choice(STOPS[: 5 if processes == 1 else 2]) if kind == "stop" else kind
    phases = ["moment", *(phase for phase in PHASES if counts.get(phase))]
    phase = rng.choice(phases)
    phase = "moment" if kind == "twin" or everybody else phase
    nth = 1 + int(counts.get(phase, 1) * rng.random() ** 2)  # a resumed attempt has fewer events
    delay = rng.choice((0.0, 0.2 * rng.random()))
    at, free, clock, cut = rng.random(), rng.random(), rng.random(), rng.random()
    offsets = rng.choice((("+0", "+3d"), ("+0", "-400d"), ("-9000d", "+0"), ("+5y", "-2h")))
    what, cold = rng.choice(CUTS), rng.random() < 0.05
    return Fault(
        kind, phase, nth, delay, at, tuple(range(processes)) if everybody and kind == "SIGKILL" else (who,),
        free_after=1.0 if kind == "fill" and free < 0.3 else None,
        clock=offsets if can.clock and clock < 0.12 else None,
        cut=what if cut < 0.25 else None, cold=cold or phase == "prepare",
    )  # fmt: skip


def cut(what: str, rng: random.Random, run: Path, cache: Path, compiled: Path) -> Path | None:
    """Take the end of a file away, as a machine that went down may; returns it, None where there is nothing to cut."""
    if what == "checkpoint":
        whole = whole_steps(run / "checkpoints")
        newest = run / "checkpoints" / str(max(whole, default=0))
        files = _files(newest) if len(whole) > 1 and (newest / "files.json").exists() else []
    elif what in ("cache", "compiled"):
        files = _files(cache if what == "cache" else compiled)
    else:
        files = [run / what] if (run / what).is_file() else []
    files = [file for file in files if file.stat().st_size]
    if not files:
        return None
    file = rng.choice(files)
    size = file.stat().st_size
    lost = rng.randrange(1, size + 1) if not what.endswith(".jsonl") else min(size, rng.randrange(1, 600))
    with file.open("r+b") as opened:
        opened.truncate(size - lost)
    return file


def _files(directory: Path) -> Sequence[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and not p.is_symlink())


def forget_prepared(cache: Path) -> None:
    """The next attempt prepares its data anew."""
    shutil.rmtree(cache, ignore_errors=True)


def specification(fault: Fault, process: int, disk: Path) -> dict[str, Any]:
    """What tests.soak.victim is told; a moment is awaited by whoever started it."""
    spec: dict[str, Any] = {"slow": 0.3} if fault.kind == "twin" else {}
    if fault.kind in ("none", "twin") or fault.phase == "moment" or process not in fault.victims:
        return spec
    return {"phase": fault.phase, "nth": fault.nth, "delay": fault.delay, "do": fault.kind, "disk": str(disk)}
