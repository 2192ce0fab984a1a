"""Whether a run whose processes have ended is started again: by its STATUS, then by the code of its processes."""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.data.prepare import replace_or_overwrite
from mixtral_jax.train.base import checkpoints_of
from mixtral_jax.train.checkpoints import whole_steps
from mixtral_jax.train.errors import ExitCode
from mixtral_jax.train.run_files import json_object

MOST, MOST_UNSEEN = 3, 10  # starts one after another without a new checkpoint; while nobody can tell


class Verdict(NamedTuple):
    """What comes of an attempt."""

    again: bool
    code: int
    reason: str
    note: str = ""  # of how many starts it was one

    def __str__(self) -> str:
        return f"{'again' if self.again else 'final'} {self.code} {self.reason}{self.note}"

    @property
    def short(self) -> str:
        """Beside what the run has said by itself."""
        return f"{self.code}, {_named(self.code)}{self.note}"


def verdict(run: Path, code: int, before: int) -> Verdict:
    """Judge the attempt that has just ended, and count it.

    STATUS is believed where it is that of a later start than `before` and says how it ended: the code of a launcher of
    several processes may be that of the one that was killed. 0, 2, 3 and 4 are final. Everything else goes on, at most
    MOST times without a new checkpoint, and MOST_UNSEEN times while the checkpoints cannot be listed. A full disk takes
    the count over the last one; where it cannot be written at all, only what has saved and stopped (75) goes on.

    Args:
        code: of the processes; negative or above 128: a signal ended them.
        before: the number of the last start when they were started.
    """
    status = json_object(run / "STATUS")
    said, reason = status.get("exit_code"), _named(code)
    if isinstance(said, int) and isinstance(status.get("attempt"), int) and status["attempt"] > before:
        code, reason = said, str(status.get("reason", ""))
    if code in ExitCode.final():
        return Verdict(False, code, reason)
    counted = run / "launch" / "restarts.json"
    count = {"newest": None, "times": 0, "unseen": 0} | json_object(counted)
    try:
        newest = next(whole_steps(checkpoints_of(run)), None)  # in the run's directory, or where its config.yaml says
    except Exception as error:  # of a bucket's client, or of a file that is not whole: a verdict is needed
        kind, most, what = "unseen", MOST_UNSEEN, f"while its checkpoints cannot be listed ({type(error).__name__})"
    else:
        kind, most, what = "times", MOST, "without a new checkpoint"
        count = {"newest": newest, "times": count["times"] if count["newest"] == newest else 0, "unseen": 0}
    count[kind] += 1
    try:
        counted.parent.mkdir(parents=True, exist_ok=True)
        replace_or_overwrite(counted, json.dumps(count) + "\n")
    except OSError as error:
        if code != ExitCode.STOPPED:  # what may fail again and again has to be counted
            return Verdict(False, code, reason, f"; its starts cannot be counted ({error.strerror or error})")
    if count[kind] > most:
        return Verdict(False, code, reason, f"; started again {most} times {what}")
    note = f" (start {count[kind]} of {most} {what})" if count[kind] > 1 or kind == "unseen" else ""
    return Verdict(True, code, reason, note)


def _named(code: int) -> str:
    with contextlib.suppress(ValueError):
        return ExitCode(code).meaning
    return f"ended by signal {-code if code < 0 else code - 128}" if code < 0 or code > 128 else f"status {code}"
