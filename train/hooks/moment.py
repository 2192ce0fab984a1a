"""What a hook is, and what it sees after a step."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from mixtral_jax.train.state import TrainState
from mixtral_jax.train.step import StepReport


class Moment(NamedTuple):
    """What a hook sees after a step. The state is valid until the hook returns: the next step donates it."""

    step: int  # updates done
    state: TrainState
    report: StepReport
    tokens: int  # not padding, since the run began
    last: bool  # no step follows


class Hook(Protocol):
    """Something that happens between steps."""

    def due(self, step: int, last: bool) -> bool:
        """After this step?"""
        ...

    def run(self, moment: Moment) -> None:
        """Do it."""
        ...


def to_floats(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """One transfer off the device."""
    return {name: float(value) for name, value in jax.device_get(dict(scalars)).items()}
