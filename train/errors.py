"""How a process ends: the exit codes, and the one table that says which failure has which.

A failure is told by what failed, not by the type of its exception: the same OSError is a name that the user got wrong,
a disk that is full, or memory that this machine does not have.
"""

import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple, Self


class ExitCode(IntEnum):
    """Supervisors read these: 2, 3 and 4 are final; 74, 75, 76 and 124: the same command goes on (docs/runs.md)."""

    meaning: str  # in a few words, for launch files and their documentation

    DONE = 0, "done"  # or nothing left to do
    UNEXPECTED = 1, "an unexpected exception, or no memory"
    USAGE = 2, "usage, configuration or data"
    NOT_FINITE = 3, "loss or gradient is not finite"  # or updates are skipped for ever; the last good checkpoint stands
    DIFFERENT = 4, "verify found a difference"
    STORAGE = 74, "storage failed"  # a disk is full or does not answer; the checkpoints that were whole stand
    STOPPED = 75, "stopped on request, saved"
    PEER_LOST = 76, "another process was lost"  # or the one that coordinates them
    WATCHDOG = 124, "nothing moved"
    AT_ONCE = 130, "a second Ctrl-C"  # as a shell reports a process that it ended

    def __new__(cls, value: int, meaning: str = "") -> Self:
        code = int.__new__(cls, value)
        code._value_, code.meaning = value, meaning
        return code

    @classmethod
    def final(cls) -> tuple["ExitCode", ...]:
        """Those behind which the same command comes no further."""
        return (cls.DONE, cls.USAGE, cls.NOT_FINITE, cls.DIFFERENT)

    @classmethod
    def again(cls) -> tuple["ExitCode", ...]:
        """Those that ask for the same command."""
        return (cls.STORAGE, cls.STOPPED, cls.PEER_LOST, cls.WATCHDOG)


class Outcome(NamedTuple):
    """How a run ended."""

    state: str
    step: int
    reason: str
    exit_code: ExitCode


class UserError(ValueError):
    """A mistake in usage, configuration or data: shown as one sentence, exit code 2."""

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE


class StorageError(UserError):
    """What a run writes or reads could not be written or read, and the user's file is not to blame."""

    exit_code = ExitCode.STORAGE


class PeerLost(UserError):
    """Another process of the run is not there, or no longer."""

    exit_code = ExitCode.PEER_LOST


AGAIN = "run the same command again"


class Failure(NamedTuple):
    """How an exception ends a process. Without a sentence it is a bug of ours, and its traceback is shown."""

    exit_code: ExitCode
    reason: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """What it was, and what to do."""
        return "; ".join(filter(None, (self.reason, self.remedy)))


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMED, _FULL, _BROKEN = (ExitCode.USAGE, ""), (ExitCode.STORAGE, f"make room and {AGAIN}"), (ExitCode.STORAGE, AGAIN)
_MEMORY = ExitCode.UNEXPECTED, "free some, or ask for less: data.workers, micro_batch_size"
_NAMES = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_CHILD = ExitCode.UNEXPECTED, "if for memory, set data.workers lower"
# what the system says -> exit code, and what to do
TABLE: dict[int, tuple[ExitCode, str]] = {
    **dict.fromkeys((*_NAMES, errno.EPERM, errno.EACCES), _NAMED),
    **dict.fromkeys(FULL, _FULL),
    **dict.fromkeys((errno.EIO, errno.EROFS, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT), _BROKEN),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), (ExitCode.USAGE, "allow more of them (ulimit -n)")),
    errno.ENOMEM: _MEMORY,
    errno.ECHILD: _CHILD,
}
_OF_TYPE = {  # exceptions that are raised without the system's number
    FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR, PermissionError: errno.EACCES, ChildProcessError: errno.ECHILD,
    MemoryError: errno.ENOMEM,
}  # fmt: skip

_OF_CONTENTS = (ValueError, KeyError, TypeError)
# no refusals, though a client of an object store may raise errors of any other kind
_BUGS = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, NameError, ImportError)
_NO_CLIENTS = ("builtins", "mixtral_jax", "jax", "jaxlib", "flax", "optax", "numpy")
_NOT_SERVED = ("UNAVAILABLE: ", "DEADLINE_EXCEEDED: ", "ABORTED: ", "RESOURCE_EXHAUSTED: ")  # an object store's, 503


def failure_of(error: BaseException) -> Failure:
    """What an exception means for the process that it ends."""
    from pydantic import ValidationError  # slow to import, and only errors need it

    if isinstance(error, UserError):
        return Failure(error.exit_code, str(error) or type(error).__name__)
    code = _system_code(error)
    if code in TABLE:
        exit_code, remedy = TABLE[code]
        return Failure(exit_code, _said(error), remedy)
    # a ValueError (or NaN found) by our own code; the same from a library is our bug
    found = isinstance(error, ValueError | FloatingPointError) and is_raised_by_us(error)
    if isinstance(error, ValidationError) or found:
        nan = isinstance(error, FloatingPointError)
        return Failure(ExitCode.NOT_FINITE if nan else ExitCode.USAGE, str(error) or type(error).__name__)
    return Failure(ExitCode.UNEXPECTED, "")


def is_raised_by_us(error: BaseException) -> bool:
    """Whether it comes from this project's code, not from a library that the code calls."""
    return _raised_in(error) in ("launch", "mixtral_jax", "__main__")


def _raised_in(error: BaseException) -> str:
    """The package whose code did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").split(".")[0] if frames else ""


def is_of_the_system(error: BaseException) -> bool:
    """Whether it says nothing of what a file holds, only that nobody could look: no permission, a disk, no memory."""
    code = _system_code(error)
    return code not in _NAMES if code else not isinstance(error, _OF_CONTENTS)


def is_of_storage(error: BaseException) -> bool:
    """Whether storage refused what a run does with its own checkpoints, whose names nobody has mistyped."""
    if isinstance(error, UserError) or type(error).__name__ == "JaxRuntimeError":  # is said already; a peer, or memory
        return False
    kind, code = type(error), _system_code(error)
    room = _raised_in(error) if kind is RuntimeError else kind.__module__.partition(".")[0]
    of_a_client = room not in _NO_CLIENTS and not isinstance(error, _BUGS)  # of an object store
    refused = isinstance(error, OSError) or bool(code) or of_a_client
    return refused and code not in (errno.ENOMEM, errno.ECHILD)


def explain(error: BaseException, with_traceback: bool = False) -> ExitCode:
    """Say on stderr what ended this process: one or a few lines for what a user can mend, a traceback for our bugs."""
    failure = failure_of(error)
    exit_code, sentence = failure.exit_code, failure.sentence
    if with_traceback or not sentence:
        traceback.print_exception(error)
    lines = sentence.splitlines() or [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    if exit_code != ExitCode.USAGE:
        print(f"exit {exit_code}: {' '.join(lines)}", file=sys.stderr)
        return exit_code
    print(*(f"error: {line}" for line in lines), sep="\n", file=sys.stderr)
    if len(lines) > 1:
        print(f"exit 2: {len(lines)} problems, named above", file=sys.stderr)
    return exit_code


def _system_code(error: BaseException) -> int:
    """The system's number of an exception, or of what a library made of one; 0: it has none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    named = [code for kind, code in _OF_TYPE.items() if isinstance(error, kind)]
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        named.append(errno.ENOMEM)
    # tensorstore and array_record report a full disk as an error of their own, `INTERNAL: ...`, `write() failed: ...`
    if type(error).__name__ != "JaxRuntimeError" and re.match(r"([A-Z_]+|[a-z]+\(\) failed): ", str(error)):
        named += [code for code in (*FULL, errno.EIO, errno.EROFS) if os.strerror(code) in str(error)]
        named += [errno.ETIMEDOUT] * str(error).startswith(_NOT_SERVED)
    return named[0] if named else 0


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory{f': {error}' if str(error) else ''}"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is unknown: the nearest known one, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# What asks a run to stop: beside the first two a terminal that is closed, and what `sbatch --signal` sends in time.
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def command(*, last: bool = False) -> Iterator[None]:
    """A command that goes on where it was begins: a signal ends the process with 75, until something can be saved.

    Behind the `last` one the process ends, with a code that no signal changes any more.
    """
    global _began
    _began, before = time.monotonic(), {}
    if threading.current_thread() is threading.main_thread():
        for number in ASKING:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, end_at_once)
    try:
        yield
    finally:
        _began = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)  # Python would give back its own at its end


def command_began() -> float | None:
    """When this process's command did, by time.monotonic(); None: there is none, it is a library's user."""
    return _began


_began: float | None = None


def end_at_once(number: int, frame: Any) -> None:
    """The handler of signals while there is nothing to save."""
    with contextlib.suppress(OSError):  # a terminal that is closed
        shown = "\033[?25h" * os.isatty(2)  # a progress bar hides the cursor
        os.write(2, f"{shown}\nexit {ExitCode.STOPPED}: {signal.Signals(number).name}: {AGAIN}\n".encode())
    os._exit(ExitCode.STOPPED)
