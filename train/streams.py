"""A stream that outlives whoever reads it."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, TextIO


class Lasting:
    """A stream whose reader or disk may go away (`| head`, a closed terminal): what is written then is lost, no more.

    Its file then is /dev/null, so that what lies in its buffer is no error at the end of the process either.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # the process had none: `>&-`

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def close(self) -> None:
        self._attempt(self._stream.close)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[..., Any], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
