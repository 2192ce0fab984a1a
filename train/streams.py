"""A stream that outlives whoever reads it."""

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any, Self, TextIO


class Lasting:
    """A stream whose reader or disk may go away (`| head`, a closed terminal): what is written then is lost, no more.

    Its file then is /dev/null, so that what lies in its buffer is no error at the end of the process either. `error` is
    what was lost for another reason than a reader who had enough.
    """

    error: OSError | None = None

    def __init__(self, stream: TextIO | Self | None):
        own: TextIO | None = stream._stream if isinstance(stream, Lasting) else stream
        self._stream: TextIO = own or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # the process had none: `>&-`

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
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.error = error
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
