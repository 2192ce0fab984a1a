"""What a run is doing, since when, and how long it did what: for the watchdog, STATUS and the account of the time."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Phase(Enum):
    """What a run is doing: the state that STATUS shows, the kind of its time, its limit, and the event that it is.

    Events have the names that the package ml-goodput-measurement logs them under.
    """

    STARTING = "preparing", "start", "", "tpu_init"  # imports, the other processes, the devices
    PREPARING = "preparing", "start", "prepare", "training_prep"
    RESTORING = "restoring", "restore", "restore", "training_prep"
    COMPILING = "compiling", "compile", "compile", "training_prep"
    FIRST_STEP = "training", "step", "first_step", "step"
    STEP = "training", "step", "step", "step"
    READING = "training", "data_wait", "", "data_loading"
    BETWEEN = "training", "other", "", ""  # the body of the caller's loop
    FIRST_BATCH = "evaluating", "evaluation", "compile", "custom_badput_event"  # it compiles
    EVALUATING = "evaluating", "evaluation", "evaluation_batch", "custom_badput_event"
    SAMPLING = "sampling", "sampling", "sampling", "custom_badput_event"
    SAVING = "saving", "save", "save", ""
    LAST_SAVE = "saving", "save", "last_save", ""

    def __init__(self, state: str, kind: str, limit: str, event: str):
        self.state, self.kind, self.limit, self.event = state, kind, limit, event


KINDS = tuple(dict.fromkeys(phase.kind for phase in Phase))
_AHEAD = (Phase.STARTING, Phase.PREPARING, Phase.RESTORING, Phase.COMPILING, Phase.READING)
_FEW = 3


class Reading(NamedTuple):
    """What a run is doing at one moment."""

    phase: Phase  # in which something must move; that of a batch which it waits for is its own
    idle: float  # seconds since something moved
    seconds: dict[str, float]  # by kind, of this attempt
    events: dict[str, float]  # <event>_start_time of the first and <event>_end_time of the last, seconds since 1970


class Phases:
    """The one object that knows. The main thread moves it, others read.

    Phases lie within each other; time counts for the innermost, and each move is a beat.
    """

    def __init__(self, began: float | None = None):
        """`began`: of time.monotonic(), when the process did."""
        self.began = self._counted = time.monotonic() if began is None else began
        self.began_at = time.time() - (time.monotonic() - self.began)  # seconds since 1970
        self.changed: Callable[[], None] = lambda: None  # called where the state becomes another
        self.longest_save = 0.0  # seconds from the beginning of a save to its end, in the background too
        self._lock = threading.RLock()
        self._stack: list[tuple[Phase, object]] = [(Phase.STARTING, None)]
        self._beat = time.monotonic()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._events = {f"{Phase.STARTING.event}_start_time": self.began_at}
        self._stays, self._longest = Counter[Phase](), dict.fromkeys(Phase, 0.0)

    @property
    def now(self) -> Phase:
        """The innermost phase."""
        return self._stack[-1][0]

    @property
    def around(self) -> Phase:
        """The innermost one but for reading: a batch is waited for in the midst of something."""
        return next(phase for phase, _ in reversed(self._stack) if phase is not Phase.READING)

    @property
    def state(self) -> str:
        """What STATUS says."""
        return self.around.state

    @property
    def ends_at_once(self) -> bool:
        """Whether a signal does: there is nothing yet that would have to be saved."""
        return all(phase in _AHEAD for phase, _ in self._stack)

    def become(self, phase: Phase) -> None:
        """The outermost phase, which lasts until it becomes another."""
        self._move(lambda: self._stack.__setitem__(0, (phase, None)))

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """A phase within the present one."""
        own = phase, object()  # a generator that was left takes out its own, whenever it is closed
        began = time.monotonic()
        self._move(lambda: self._stack.append(own))
        try:
            yield
        finally:
            self._move(lambda: self._stack.remove(own))
            self._stays[phase] += 1
            self._longest[phase] = max(self._longest[phase], time.monotonic() - began)

    def reading(self, batches: Iterator[T]) -> "Reader[T]":
        """The same batches; the time in which they are waited for counts as that."""
        return Reader(batches, self)

    def beat(self) -> None:
        """Something moved."""
        self._beat = time.monotonic()

    def read(self) -> Reading:
        """What it is doing at this moment."""
        with self._lock:
            self._count()
            return Reading(self.around, self._counted - self._beat, dict(self._seconds), dict(self._events))

    @property
    def margin(self) -> float | None:
        """Seconds in which the run can certainly be saved: the longest save, and a few steps. None: none was saved."""
        save = max(self.longest_save, self._longest[Phase.SAVING], self._longest[Phase.LAST_SAVE])
        steps = self._stays[Phase.STEP] + self._stays[Phase.FIRST_STEP]
        step = (self._seconds["step"] + self._seconds["data_wait"]) / max(1, steps)
        return save + self._longest[Phase.SAMPLING] + _FEW * step if save else None

    def _move(self, change: Callable[[], None]) -> None:
        with self._lock:
            before, state = self.now, self.state
            self._count()
            change()
            self.beat()
            wall = time.time()
            if before.event != self.now.event:
                if before.event:
                    self._events[f"{before.event}_end_time"] = wall
                if self.now.event:
                    self._events.setdefault(f"{self.now.event}_start_time", wall)
        if state != self.state:
            self.changed()

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self.now.kind] += now - self._counted
        self._counted = now


class Reader(Iterator[T]):
    """An iterator that notes how long it is waited for."""

    def __init__(self, batches: Iterator[T], phases: Phases):
        self._batches, self._phases = batches, phases

    def __next__(self) -> T:
        with self._phases.during(Phase.READING):
            return next(self._batches)
