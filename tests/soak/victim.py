"""One process of a run, with a fault in it: launch.py, watched from outside by Python's audit hooks.

python -m tests.soak.victim SPEC COMMAND FILE OVERRIDES...

SPEC is a JSON object: `phase` and `nth` say when (the nth event of that phase), `delay` how many seconds later, `do`
what: the name of a signal to this process, `fill` (its file system is full from then on) or nothing; `slow` makes each
step take so many seconds; `counts` names a file that gets the number of events of each phase. The product knows
nothing of this: a phase is told by the file that is opened for writing, moved or removed, or by a function called.
"""

import importlib
import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Which phase a changed file belongs to; the first that matches the path counts.
_FILES = (
    ("save", re.compile(r"/checkpoints/\d+\.|/checkpoints/\d+/files\.json")),
    ("prune", re.compile(r"/checkpoints/\d+(/|$)")),  # what is not moved there, see `phase_of`
    ("owner", re.compile(r"/LEASE|/checkpoints/")),
    ("status", re.compile(r"/STATUS")),
    ("prepare", re.compile(r"/cache/")),
)
# Which phase begins with a call of which function.
_CALLS = {
    "compile": ("jax.stages", "Lowered.compile"),
    "step": ("mixtral_jax.train.feed", "Feed.__next__"),
    "evaluation": ("mixtral_jax.train.hooks.evaluate", "Evaluate.measure"),
    "restore": ("mixtral_jax.checkpoint", "restore"),
}
PHASES = tuple(name for name, _ in _FILES) + tuple(_CALLS)
FILLER = "filler"  # what fills the disk: the one that mends it removes it


class Fault:
    """Counts the events of each phase, and strikes at the one that was asked for."""

    def __init__(self, spec: dict[str, Any]):
        self._spec, self._struck, self.counts = spec, False, Counter[str]()

    def count(self, phase: str) -> None:
        """One more event of `phase`, about to happen."""
        self.counts[phase] += 1
        due = phase == self._spec.get("phase") and self.counts[phase] == self._spec["nth"]
        if due and not self._struck:
            self._struck = True
            if delay := self._spec.get("delay", 0):
                threading.Timer(delay, self._strike).start()
            else:
                self._strike()

    def _strike(self) -> None:
        os.write(2, b"soak: strikes\n")
        if self._spec["do"] == "fill":
            fill(Path(self._spec["disk"]))
        else:
            os.kill(os.getpid(), signal.Signals[self._spec["do"]])

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit hook."""
        if phase := phase_of(event, arguments):
            self.count(phase)


def fill(disk: Path) -> None:
    """Leave no byte free on the file system of `disk`."""
    with (disk / FILLER).open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def phase_of(event: str, arguments: tuple[Any, ...]) -> str | None:
    """That of a file which is opened for writing, made, moved or removed."""
    removes = event in ("os.remove", "os.rmdir")
    if event == "open":
        if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return None
        path, place = arguments[0], -1
    elif event == "os.rename":
        path, place = arguments[1], arguments[3]
    elif removes or event == "os.mkdir":
        path, place = arguments[0], arguments[-1]
    else:
        return None
    if not isinstance(path, str | bytes | os.PathLike):
        return None  # a descriptor
    name = os.fsdecode(path)
    if place != -1 and not os.path.isabs(name):  # rmtree names files by the directory that is open
        name = os.path.join(os.readlink(f"/proc/self/fd/{place}"), name)
    found = next((phase for phase, pattern in _FILES if pattern.search(os.path.abspath(name))), None)
    return "save" if found == "prune" and not removes else found


def _watch_call(module: str, name: str, heard: Callable[[], None]) -> None:
    """Say so before each call of a function."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    call = getattr(owner, last)

    def watched(*arguments: Any, **options: Any) -> Any:
        heard()
        return call(*arguments, **options)

    setattr(owner, last, watched)


def _watch(fault: Fault, spec: dict[str, Any]) -> None:
    phases = list(_CALLS) if "counts" in spec else [spec.get("phase")] if spec.get("phase") in _CALLS else []
    for phase in phases:
        _watch_call(*_CALLS[phase], lambda phase=phase: fault.count(phase))
    if seconds := spec.get("slow"):
        _watch_call(*_CALLS["step"], lambda: time.sleep(seconds))
    sys.addaudithook(fault.hear)
    if "faketime" in os.environ.get("LD_PRELOAD", ""):
        # Python sleeps until a time of the monotonic clock, which libfaketime 0.9.10 takes for one of the clock it sets
        time.sleep = lambda seconds: select.select([], [], [], seconds)[:0]


def main(argv: list[str]) -> int:
    """Run the command with the fault in it; returns its exit code."""
    spec = json.loads(argv[0])
    fault = Fault(spec)
    _watch(fault, spec)
    launch = importlib.import_module("mixtral_jax.launch")
    sys.argv[1:] = argv[1:]
    code = launch.main()  # as a process of its own: behind its outcome it hears no signal
    if "counts" in spec:
        Path(spec["counts"]).write_text(json.dumps(fault.counts))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
