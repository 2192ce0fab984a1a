"""What the hooks do behind a step, and how a signal breaks that off."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from mixtral_jax.train.hooks.evaluate import BrokenOff
from mixtral_jax.train.hooks.log import Log
from mixtral_jax.train.hooks.moment import Hook, Moment


def run_due(hooks: Iterable[Hook], moment: Moment, pause: Callable[..., AbstractContextManager[None]]) -> str | None:
    """Run those that are due, each in a `pause` of the training time; returns what asked to stop in the middle."""
    for hook in hooks:
        if moment.report is None and isinstance(hook, Log):
            continue  # nothing to say of no step
        try:
            if hook.due(moment.step, moment.last):  # asked as late: an evaluation can make a checkpoint due
                with pause(counted=isinstance(hook, Log)):
                    hook.run(moment)
        except BrokenOff as stop:
            return str(stop)
    return None
