"""One writer of a run directory at a time: the file LEASE in it, with a counter that its owner's thread moves.

Whoever finds a lease watches its counter on a clock of its own: where it moves the directory is taken, where it stands
still for a minute the owner is gone, whatever the clocks of both machines say. No lock of a file system is needed:
those of shared ones do not hold everywhere. A file that is made where there is none and replaced by a rename will do.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtral_jax.data.prepare import digest, write_atomically
from mixtral_jax.data.progress import say
from mixtral_jax.train.errors import UserError

FILE = "LEASE"
BEAT_SECONDS, PATIENCE_SECONDS = 3.0, 60.0  # the counter of an owner moves; one that stands still is taken over
_POLL_SECONDS, _JOIN_SECONDS = 0.2, 10.0
_ours: set[str] = set()  # ids of the leases that this process holds or has handed over to itself
_made: "weakref.WeakValueDictionary[str, Lease]" = weakref.WeakValueDictionary()  # by id
os.register_at_fork(after_in_child=_ours.clear)  # what the parent holds is another process's


class Lease:
    """Holds a directory from `take` to `release`.

    Args:
        lost: called from the lease's thread, with a sentence, where another process has taken the directory over.
    """

    def __init__(self, directory: Path, lost: Callable[[str], None]):
        self.directory, self.file = directory, directory / FILE
        self._lost, self._said = lost, {**_this_process(), "id": uuid.uuid4().hex, "beat": 0}
        self.handed_over = False  # to a later one of this process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> str:
        """Own the directory: at once where nobody does, or where the owner is known to be gone; else watch its counter.

        Returns a sentence where it was taken over.

        Raises:
            UserError: the counter moves: another process writes there; or it is a link to nothing.
            OSError: the file cannot be written.
        """
        _ours.add(self._said["id"])
        _made[self._said["id"]] = self
        began, taken = time.monotonic(), ""
        while not taken and not self._create():
            if (found := read(self.directory)) is None:  # released just now, or a cache of the file system is behind
                if time.monotonic() - began > 2 * PATIENCE_SECONDS:
                    raise UserError(f"{self.file} can be neither made nor read: remove it")
                time.sleep(_POLL_SECONDS)
                continue
            if not _is_gone(found):
                found = self._watch(found)
            if found is not None and self._follow(found, time.monotonic() - began > 2 * PATIENCE_SECONDS):
                taken = f"the lease of {self.directory} is taken over from {owner(found)}, which is gone"
        self._thread.start()
        return taken

    def _follow(self, found: dict[str, Any], at_last: bool) -> bool:
        """Take the place of a lease whose owner is gone, if it still stands there: of several only one succeeds."""
        turn = self.directory / f"{FILE}.{digest(found)[:16]}"
        try:
            turn.touch(exist_ok=False)
        except FileExistsError:  # another one is at it, or ended in the middle of it
            if at_last:
                turn.unlink(missing_ok=True)
            time.sleep(_POLL_SECONDS)
            return False
        try:
            if stands := read(self.directory) == found:
                write_atomically(self.file, json.dumps(self._said))
                if found.get("id") in _ours and (before := _made.get(found["id"])) is not None:
                    before.handed_over = True
                    before.stop()
            return stands
        finally:
            turn.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Where there is no lease; of several only one succeeds."""
        try:
            made = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(made, "w", encoding="utf-8") as file:
                file.write(json.dumps(self._said))
        except OSError:
            self.file.unlink(missing_ok=True)  # half of one says nothing
            raise
        return True

    def _watch(self, found: dict[str, Any]) -> dict[str, Any] | None:
        """What stands there after so long without a movement; None: it was released."""
        began, told = time.monotonic(), False
        while time.monotonic() - began < PATIENCE_SECONDS:
            time.sleep(_POLL_SECONDS)
            now = read(self.directory)
            if now is None:
                return None
            if now != found and "id" in now and now["id"] == found.get("id"):
                raise UserError(
                    f"{self.directory} is being written by {owner(now)}: one process at a time; stop that one first, "
                    "or choose another run_name"
                )
            if now != found:  # it was being written when we looked, or has another owner
                began, found = time.monotonic(), now
            if not told and time.monotonic() - began > 3 * BEAT_SECONDS:
                told = True
                say(f"{self.directory} is leased to {owner(found)}: watching {PATIENCE_SECONDS:g} s whether that lives")
        return found

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("id") == self._said["id"]

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # what cannot be read or written now may be so the next time
                if (found := self._beat()) is not None:
                    if found["id"] not in _ours:
                        self._lost(f"{self.directory} was taken over by {owner(found)}: this process writes no more")
                    return

    def _beat(self) -> dict[str, Any] | None:
        """Move the counter, in the file as it lies there: one that has taken its place is never written over.

        What was cut off, or removed, is made good. Returns another's lease where there is one.
        """
        self._said["beat"] += 1
        try:
            file = self.file.open("r+", encoding="utf-8", errors="replace")
        except FileNotFoundError:
            self._create()
            return None
        with file:
            found = _parse(file.read())
            if "id" in found and not self._is_ours(found):
                return found
            file.seek(0)
            file.write(json.dumps(self._said))
            file.truncate()
        return None

    def stop(self) -> None:
        """Move the counter no more."""
        self._stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    def release(self) -> None:
        """Let go of it; a lease that another one has taken stays."""
        self.stop()
        with contextlib.suppress(OSError):
            if self._is_ours(read(self.directory)) and self._said["pid"] == os.getpid():  # not a child's copy
                self.file.unlink()


def read(directory: Path) -> dict[str, Any] | None:
    """Whose a directory is: host, pid, id and beat of its lease; without an id where the file is cut off; None: free.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return _parse((directory / FILE).read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) and isinstance(found.get("id"), str) else {"text": text}


def owner(found: dict[str, Any]) -> str:
    """As a part of a sentence."""
    return f"process {found['pid']} on {found['host']}" if {"pid", "host"} <= found.keys() else "an unknown process"


def is_of_others(directory: Path) -> bool:
    """Whether another process has the lease, or nobody can say."""
    try:
        found = read(directory)
    except OSError:
        return True
    return found is not None and found.get("id") not in _ours


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    here = {"host": socket.gethostname(), "pid": pid, "boot": "", "namespaces": "", "started": _started(pid)}
    with contextlib.suppress(OSError):  # not Linux: nobody then says that this process is gone but its counter
        here["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        here["namespaces"] = " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time"))
    return here


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether the owner is known to have ended: an older lease of this process, or a process that this system had.

    A number of a process says something only within one start of one machine, and among the processes of one container.
    """
    if found.get("id") in _ours:
        return True
    here, pid = _this_process(), found.get("pid")
    same = all(here[key] and here[key] == found.get(key) for key in ("host", "boot", "namespaces"))
    if not same or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return _started(pid) not in (None, found.get("started"))  # the number may be another process's by now


def _started(pid: int) -> str | None:
    """When a process began, in the system's ticks; `ended` of one that nobody has waited for; None: nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]
