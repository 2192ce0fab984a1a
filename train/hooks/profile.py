"""A trace of a few steps."""

from pathlib import Path

import jax
from pydantic import Field

from mixtral_jax.config import FrozenConfig
from mixtral_jax.train.console import Console
from mixtral_jax.train.hooks.moment import Moment


class ProfileConfig(FrozenConfig):
    """A jax.profiler trace, written to <run>/profile."""

    start: int = Field(10, gt=1, description="step at which the trace begins")
    steps: int = Field(3, gt=0, description="how many steps it covers")


class Profile:
    """A jax.profiler trace over a few steps."""

    def __init__(self, config: ProfileConfig, directory: Path, console: Console):
        self._first, self._end = config.start, config.start + config.steps
        self._directory, self._console = directory, console
        self._tracing, self._begun = False, False

    def due(self, step: int, last: bool) -> bool:
        if not self._begun and step >= self._first and not any(self._directory.glob("**/*")):
            self._first, self._end = step + 1, step + 1 + self._end - self._first  # of a run that goes on behind it
        self._begun = True
        return step + 1 == self._first or (self._tracing and (last or step + 1 >= self._end))

    def run(self, moment: Moment) -> None:
        if self._tracing:
            jax.block_until_ready(moment.state)
            jax.profiler.stop_trace()
            self._console.say(f"profile of steps {self._first} to {moment.step} in {self._directory}")
        elif not moment.last:
            jax.profiler.start_trace(str(self._directory))
        self._tracing = not self._tracing and not moment.last

    def close(self) -> None:
        """End a trace that is under way: the steps that it would see do not come, or come once more."""
        if self._tracing:
            jax.profiler.stop_trace()
        self._tracing = False
