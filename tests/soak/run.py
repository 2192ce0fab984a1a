"""A run that is killed, filled, cut and set back for as long as asked for, and must not be told from one left in peace.

python -m tests.soak.run --minutes 30 --seed 1 [--processes 1,2,4] [--record docs/reliability.md] [--keep DIR]

Exit 0: nothing differed; 1: something did, and what the runs and their processes left is kept.
"""

import argparse
import contextlib
import glob
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from tests.soak import faults
from tests.soak.attempt import Attempt, Ended, World
from tests.soak.checks import History, Reference, read_status
from tests.soak.faults import NONE, Abilities, Fault
from tests.soak.victim import FILLER
from tests.tiny import write_run_file

KEEP_LAST = 2
STEPS = {1: 40, 2: 20, 4: 12}  # by processes
CHANGES: dict[str, Any] = {
    "log": {"every": 1}, "eval": {"every": 5, "batches": 2}, "micro_batch_size": 4,
    "checkpoint": {"every": 4, "keep_last": KEEP_LAST},
}  # fmt: skip
FAULTS = {1: 10, 2: 5, 4: 3}  # of one run, by its processes: a start of four takes ten times as long
SHARES = {1: 8, 2: 2, 4: 1}
DISK_MEGABYTES = 24
HEADING = "| date | seed | minutes | processes | kills | full disks | files cut | clocks set | restarts | differences |"


class Soak:
    """Runs one after the other, each with its faults; what was done and what differed."""

    def __init__(self, world: World, can: Abilities, seed: int, processes: Sequence[int]):
        self._world, self._can, self._seed, self._allowed = world, can, seed, processes
        self._references: dict[int, Reference] = {}
        self._events: dict[int, list[dict[str, int]]] = {}  # by process
        self._usual: dict[int, float] = {}
        self.made: Counter[tuple[str, int]] = Counter()  # (kind, processes) of faults that came to pass
        self.restarts, self.attempts = 0, 0
        self.spent: Counter[str] = Counter()  # seconds, as the soak sees them
        self.went: Counter[str] = Counter()  # seconds, as the runs that are done account for them
        self.differences: list[str] = []

    def go(self, until: float) -> None:
        """Run after run, until the time is over; one that is under way is ended in peace."""
        number = 0
        while time.monotonic() < until:
            number += 1
            rng = random.Random(f"{self._seed}/{number}")
            weights = [SHARES[count] for count in self._allowed]
            count = rng.choices(list(self._allowed), weights)[0]
            self._refer(count)
            planned = [faults.draw(rng, self._events[count], self._can) for _ in range(FAULTS[count])]
            part = 0
            while planned and time.monotonic() < until:
                part += 1
                planned = self._one_run(f"run-{number}.{part}", count, planned, until)

    def _refer(self, count: int) -> None:
        """The run of so many processes that nobody disturbs: its numbers, its events, its time."""
        if count in self._references:
            return
        events = self._world.outputs / f"events.{count}"
        for warm in (False, True):  # the first one compiles
            name = f"undisturbed-{count}"
            shutil.rmtree(self._world.runs / name, ignore_errors=True)
            faults.forget_prepared(self._world.cache)
            ended = self._attempt(name, NONE, count, 0.0, f"{name}.{warm}", counts=events).finish()
            self.spent["undisturbed"] += ended.seconds
            if ended.problems:
                raise SystemExit("\n".join([*ended.problems, *ended.outputs]))
        self._references[count] = Reference.of(self._world.runs / name, STEPS[count])
        self._events[count] = [json.loads(Path(f"{events}.{i}").read_text()) for i in range(count)]
        self._usual[count] = ended.seconds
        shutil.rmtree(self._world.runs / name)
        print(f"{count} undisturbed: {ended.seconds:.1f} s, events {self._events[count][0]}", flush=True)

    def _one_run(self, name: str, count: int, planned: list[Fault], until: float) -> list[Fault]:
        """Attempts with the faults that are planned until the run is done; returns those that are left."""
        run = self._world.runs / name
        history = History(run, self._references[count], KEEP_LAST)
        rng = random.Random(f"{self._seed}/{name}")
        for number in range(1, 100):
            fault = planned.pop(0) if planned and time.monotonic() < until else NONE
            label = f"{name}.{number}"
            cut = self._prepare(fault, run, rng)
            history.before(fault.cut if cut else None)
            ended = self._attempt(name, fault, count, self._usual[count], label).finish()
            full = (self._world.disk / FILLER).exists() or fault.kind == "fill"
            (self._world.disk / FILLER).unlink(missing_ok=True)
            problems = ended.problems + history.after(ended.codes, full)
            self._count(fault, count, ended, cut, first=number == 1)
            print(f"{label} of {count}: {fault}: {_ends(ended, history, run)}", flush=True)
            if problems:
                self._differs(label, run, problems, ended)
                return planned
            if set(ended.codes) == {0}:
                self.went.update((read_status(run) or {}).get("seconds", {}))
                break
        shutil.rmtree(run, ignore_errors=True)
        return planned

    def _attempt(self, name: str, fault: Fault, count: int, *others: Any, counts: Path | None = None) -> Attempt:
        steps = [f"steps={STEPS[count]}"]
        return Attempt(self._world, name, fault, count, *others, overrides=steps, counts=counts)

    def _prepare(self, fault: Fault, run: Path, rng: random.Random) -> Path | None:
        if fault.cold:
            faults.forget_prepared(self._world.cache)
        return faults.cut(fault.cut, rng, run, self._world.cache, self._world.compiled) if fault.cut else None

    def _count(self, fault: Fault, count: int, ended: Ended, cut: Path | None, first: bool) -> None:
        self.attempts += 1
        self.restarts += not first
        if ended.struck:
            self.made[fault.kind, count] += len(fault.victims)
        self.made["cut", count] += cut is not None
        self.made["clock", count] += fault.clock is not None
        self.spent[f"{count} process{'es' * (count > 1)}"] += ended.seconds

    def _differs(self, label: str, run: Path, problems: list[str], ended: Ended) -> None:
        kept = self._world.outputs / f"{label}.run"
        if run.exists():
            shutil.move(run, kept)
        self.differences += [f"{label}: {problem}" for problem in problems]
        for problem in problems:
            print(f"    DIFFERENCE {problem}", flush=True)
        for output in ended.outputs:
            print("      | " + "\n      | ".join(output.splitlines()[-6:]), flush=True)

    def kills(self, count: int | None = None) -> int:
        """Processes that a signal was sent to, of runs of so many processes."""
        return sum(n for (kind, of), n in self.made.items() if kind.startswith("SIG") and count in (None, of))

    def row(self, seconds: float) -> str:
        """This soak as a line of the table of docs/reliability.md."""
        by_count = " / ".join(str(self.kills(count)) for count in self._allowed)
        of = {kind: sum(n for (k, _), n in self.made.items() if k == kind) for kind in ("fill", "cut", "clock")}
        cells = [
            date.today().isoformat(), self._seed, f"{seconds / 60:.0f}", " / ".join(map(str, self._allowed)), by_count,
            of["fill"], of["cut"], of["clock"], self.restarts, len(self.differences),
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"

    def report(self, seconds: float) -> str:
        """What was done, how often, and where the time went."""
        lines = [f"seed {self._seed}, {seconds / 60:.1f} minutes, {self.attempts} attempts, {self.restarts} restarts"]
        for kind in sorted({kind for kind, _ in self.made}):
            lines.append(f"  {kind}: " + ", ".join(f"{self.made[kind, c]} of {c}" for c in self._allowed))
        spent = ", ".join(f"{what} {time_:.0f} s" for what, time_ in self.spent.items())
        lines.append(f"{self.kills()} kills; time: {spent}")
        if whole := sum(self.went.values()):
            shares = [f"{kind} {seconds / whole:.1%}" for kind, seconds in self.went.most_common()]
            lines.append(f"where the time of the runs went: {', '.join(shares)}")
        lines += [f"DIFFERENCE {difference}" for difference in self.differences]
        return "\n".join([*lines, f"{len(self.differences)} differences"])


def _ends(ended: Ended, history: History, run: Path) -> str:
    codes = " ".join(map(str, ended.codes))
    with contextlib.suppress(ValueError):
        status = read_status(run) or {}
        codes += f" {status.get('state')} at {status.get('step')}"
    struck = "" if ended.struck or set(ended.codes) == {0} else " (not struck)"
    return f"exit {codes}{struck} after {ended.seconds:.1f} s; whole before {sorted(history.whole)}"


def in_a_namespace_of_our_own(argv: Sequence[str]) -> None:
    """Start again where file systems can be mounted that vanish with this process, if the machine allows it."""
    if "SOAK_MAY_MOUNT" in os.environ:
        return
    unshare = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    may = not subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    os.environ["SOAK_MAY_MOUNT"] = str(may)
    command = [sys.executable, "-m", "tests.soak.run", *argv]
    if may:
        os.execvp(unshare[0], [*unshare, *command])


def mount(disk: Path) -> bool:
    """Make `disk` a small file system of its own; False where that is not allowed."""
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "soak", str(disk)]
    may = os.environ.get("SOAK_MAY_MOUNT") == "True"
    return may and not subprocess.run(command, capture_output=True, check=False).returncode


def record(file: Path, row: str) -> None:
    """Add a line to the table whose head is HEADING."""
    lines = file.read_text(encoding="utf-8").splitlines()
    end = lines.index(HEADING)
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    file.write_text("\n".join([*lines[:end], row, *lines[end:]]) + "\n", encoding="utf-8")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.soak.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000, help="default: another one each time")
    parser.add_argument("--processes", default="1,2,4", help="runs of how many processes (default: %(default)s)")
    parser.add_argument("--record", type=Path, help="document whose table gets a line")
    parser.add_argument("--keep", type=Path, help="work there, and leave it (default: a temporary folder)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Soak, report, and say whether nothing differed."""
    args = parse(argv)
    in_a_namespace_of_our_own(argv)
    began = time.monotonic()
    place = args.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    world = World(place / "run.yaml", place / "disk", place / "outputs", place / "compiled")
    world.outputs.mkdir(parents=True, exist_ok=True)
    data = {"cache_dir": str(world.cache)}
    world.file = write_run_file(place, output_dir=str(world.runs), data=data, **CHANGES)
    lease = any("LEASE" in p.read_text() for p in (Path(__file__).parents[2] / "train" / "run").glob("*.py"))
    can = Abilities(disk=mount(world.disk), clock=bool(glob.glob(faults.FAKETIME)), lease=lease)
    print(f"soak: seed {args.seed}, {args.minutes:g} minutes, in {place}", *can.missing(), sep="\n", flush=True)
    soak = Soak(world, can, args.seed, [int(count) for count in args.processes.split(",")])
    with contextlib.suppress(KeyboardInterrupt):
        soak.go(began + 60 * args.minutes)
    seconds = time.monotonic() - began
    print(soak.report(seconds))
    if args.record:
        record(args.record, soak.row(seconds))
    if not soak.differences and not args.keep:
        shutil.rmtree(place, ignore_errors=True)
    return bool(soak.differences)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
