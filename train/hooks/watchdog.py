"""A run in which nothing moves any more ends: exit 124."""

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable

from mixtral_jax.train.errors import ExitCode


class Watchdog:
    """Ends the process where no step finishes for `seconds`: exit 124, with every thread's stack on stderr.

    It starts with the first beat, so that compilation does not count.
    """

    def __init__(self, seconds: float | None, on_bite: Callable[[str], None]):
        self._seconds, self._on_bite = seconds or math.inf, on_bite
        self._last = math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Something moved."""
        self._last = time.monotonic()

    def rest(self) -> None:
        """Nothing needs to move until the next beat."""
        self._last = math.inf

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(self._seconds / 4, 5.0)):
            if time.monotonic() - self._last > self._seconds:
                faulthandler.dump_traceback(all_threads=True)
                self._on_bite(f"no step finished for {self._seconds:g} s (log.watchdog_seconds)")
                os._exit(ExitCode.WATCHDOG)
