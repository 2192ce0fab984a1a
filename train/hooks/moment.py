"""What a hook is, and what it sees after a step."""

from typing import Any, NamedTuple, Protocol

from mixtral_jax.train.state import TrainState
from mixtral_jax.train.step import StepReport


class Moment(NamedTuple):
    """What a hook sees after a step. The state is valid until the hook returns: the next step donates it."""

    step: int  # updates done
    state: TrainState
    report: StepReport | None  # None where a checkpoint was asked for between steps
    tokens: int  # not padding, since the run began
    last: bool  # no step follows

    @property
    def metrics(self) -> dict[str, Any]:
        """What the step reports, as numbers; waits for the step."""
        assert self.report is not None
        return self.report.metrics()


class Hook(Protocol):
    """Something that happens between steps."""

    def due(self, step: int, last: bool) -> bool:
        """After this step?"""

    def run(self, moment: Moment) -> None:
        """Do it."""
