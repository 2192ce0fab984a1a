"""One process of a run of several: launch.py, with what it read put on record and a signal or a failure on demand.

python -m tests.processes RECORDS EVENT FILE OVERRIDES..., where EVENT is `none`, or the name of a signal, `fail` or
`full` (no large file can be written for three steps), a process and a step: `SIGTERM:1:8`; a signal may also come at
`eval`, amid the first evaluation, or `compile`; or `nan`, a process and a global row from which its batch is not
finite: `nan:1:32`.
"""

import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from mixtral_jax import launch
from mixtral_jax.train import build, feed, trainer
from mixtral_jax.train.run import signals as interrupts

# Two threads of gloo write at once, so that a line of one may lie inside that of the other.
_GLOO = re.compile(
    r"\[Gloo\] Rank |\d* is connected to |\d* peer ranks\. |Expected number of connected peer ranks is : "
)

SMALL = 32 << 10


def without_gloo(output: str) -> str:
    """What a process printed, without gloo's words and the numbers that stand beside them."""
    lines = [_GLOO.sub("", line).strip("0123456789 ") if _GLOO.search(line) else line for line in output.splitlines()]
    return "\n".join(line for line in lines if not line.isdecimal())


def record_rows(directory: Path, process: int = 0) -> None:
    """From here on every batch that a run reads is written down as <directory>/<process>-<number>.npy."""
    directory.mkdir(parents=True, exist_ok=True)
    make = feed.Feed.__init__

    def recording(batches):
        for number, batch in enumerate(batches):
            np.save(directory / f"{process}-{number}.npy", batch.tokens)
            yield batch

    def init(self, batches, put):
        make(self, recording(batches), put)

    feed.Feed.__init__ = init


def disturb_elsewhere(what: str, victim: int, where: str, process: int) -> None:
    """A signal amid the first evaluation, whose batches are slow, or to a process that compiles and is deaf."""
    batches = []

    def check(self, original=interrupts.Interrupts.check):
        batches.append(1)
        if len(batches) == 3 and process == victim:
            os.kill(os.getpid(), signal.Signals[what])
        time.sleep(0.2)
        original(self)

    def compiled(*arguments, **more):
        if process == victim:
            os.kill(os.getpid(), signal.Signals[what])
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 28)
        time.sleep(60)

    if where == "eval":
        interrupts.Interrupts.check = check
    else:
        trainer.compiled = compiled


def disturb(event: str, process: int) -> None:
    """Steps are slow from the event on, since jax looks for a signal once a second."""
    what, victim, when = event.split(":")
    if not when.isdigit():
        return disturb_elsewhere(what, int(victim), when, process)
    requested = interrupts.Interrupts.requested

    def disturbed(self, step):
        if what == "full" and process == int(victim):
            room = SMALL if int(when) <= step < int(when) + 3 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        elif step == int(when) and process == int(victim):
            if what == "fail":
                raise OSError(28, "No space left on device")
            os.kill(os.getpid(), signal.Signals[what])
        if step >= int(when):
            time.sleep(0.2)
        return requested(self, step)

    interrupts.Interrupts.requested = disturbed
    return None


def spoil(victim: int, row: int, process: int) -> None:
    """What this process reads of the step that begins with a row has weights that are not finite."""

    class Loader(build.Loader):
        def __init__(self, *args, start_row, global_batch_size, **more):
            super().__init__(*args, start_row=start_row, global_batch_size=global_batch_size, **more)
            self.row, self.rows = start_row, global_batch_size

        def __next__(self):
            batch, first = super().__next__(), self.row
            self.row += self.rows
            bad = process == victim and first == row
            return batch._replace(weights=batch.weights * np.float32(np.nan)) if bad else batch

    build.Loader = Loader


if __name__ == "__main__":
    records, event, *arguments = sys.argv[1:]
    number = int(os.environ["JAX_PROCESS_ID"])
    record_rows(Path(records), number)
    if event.startswith("nan:"):
        spoil(*map(int, event.split(":")[1:]), number)
    elif event != "none":
        disturb(event, number)
    sys.exit(launch.main([json.loads(Path(arguments[0]).read_text())["stage"], *arguments]))
