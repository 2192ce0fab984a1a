"""What several processes do in the background as one."""

import contextlib
import errno
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import ClassVar, Generic, TypeVar

import jax

from mixtral_jax.train.meetings import store, told

_POLL_SECONDS, _DONE = 0.05, "done"
_works = itertools.count()

T = TypeVar("T")


class Together(Generic[T]):
    """Work in the background, of which every process does its part: done where all of them have, else not at all."""

    left_behind: ClassVar[bool] = False  # parts that may still wait for one that failed; every process knows of them

    def __init__(self, work: Callable[[], T]):
        self._future: Future[T] = Future()
        self._place = f"mixtral_jax/parts/{next(_works)}/"
        Thread(target=self._do, args=(work,), name="together", daemon=True).start()

    def _do(self, work: Callable[[], T]) -> None:
        try:
            result = work()
        except BaseException as error:
            self._say(f"process {jax.process_index()}: {str(error).partition(chr(10))[0] or type(error).__name__}")
            self._future.set_exception(error)
        else:
            self._say(_DONE)
            self._future.set_result(result)

    def _say(self, how: str) -> None:
        if jax.process_count() > 1:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone: nobody waits any more
                store().key_value_set(f"{self._place}{jax.process_index()}", how)

    def ended(self) -> bool:
        """Whether all have done their part or one has failed. Process 0 alone can say."""
        if jax.process_count() == 1:
            return self._future.done()
        how = self._heard()
        return len(how) == jax.process_count() or any(said != _DONE for said in how)

    def result(self) -> T:
        """Wait, and get the result of this process's part.

        Raises:
            OSError: that of another process could not be done. What raised here is raised as it is.
        """
        if jax.process_count() == 1:
            return self._future.result()
        verdict = told(self._judge)
        if verdict == _DONE:
            return self._future.result()
        Together.left_behind = True
        error = self._future.exception() if self._future.done() else None
        if error is None or isinstance(error, jax.errors.JaxRuntimeError):  # waits for the other one, or has waited
            raise OSError(errno.EIO, verdict)
        raise error

    def _judge(self) -> str:
        while not self.ended():
            time.sleep(_POLL_SECONDS)
        return next((how for how in self._heard() if how != _DONE), _DONE)

    def _heard(self) -> list[str]:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has said anything
            return [how for _, how in store().key_value_dir_get(self._place)]
        return []
