"""Files on web servers, read by `requests` (which this project's dependencies bring) whether or not aiohttp is there.

fsspec's own readers take every failure for a file that does not exist, a server that is down too, and hold whole files
in memory.
"""

import errno
import os
from typing import Any

import fsspec
import requests
from fsspec.implementations.http_sync import HTTPFileSystem

from mixtral_jax.data.records.staging import START

_SECONDS = 15, 60  # to connect, and between two pieces of an answer
_PIECE_BYTES = 1 << 20


class WebFiles(HTTPFileSystem):
    """Answers 404 and 410 are files that are not there, 401 and 403 files that may not be read; all else may pass."""

    cachable = False  # a session belongs to the thread that made it

    def _ask(self, method: str, url: str, **options: Any) -> requests.Response:
        # `identity`: the size of a file is that of its own bytes, not of those that a server compresses on the way
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        try:
            answer = self.session.request(
                method, self.encode_url(url), timeout=_SECONDS, headers=headers, allow_redirects=True, **options
            )
        except (ValueError, requests.TooManyRedirects) as error:  # no address, or one that leads to itself
            raise ValueError(f"{url} cannot be read: {error}") from None
        if answer.status_code in (404, 410):
            raise FileNotFoundError(errno.ENOENT, f"is not there ({answer.status_code})", url)
        if method == "HEAD" and answer.status_code in (401, 403, 405, 501):
            return self._ask("GET", url, stream=True)  # some servers know GET alone, or an address allows no more
        if answer.status_code in (401, 403):
            raise PermissionError(errno.EACCES, f"may not be read ({answer.status_code} {answer.reason})", url)
        answer.raise_for_status()
        return answer

    def info(self, url: str, **options: Any) -> dict[str, Any]:
        """Size (None: the server does not say) and what changes when the content does."""
        with self._ask("HEAD", url) as answer:
            size = answer.headers.get("Content-Length")
        names = ("ETag", "Last-Modified", "Content-MD5")
        known = {name: answer.headers[name] for name in names if name in answer.headers}
        known = known or {"asked": os.environ.get(START, "")}  # who says nothing is asked anew by each start
        return {"name": url, "type": "file", "size": int(size) if size else None, **known}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes of a small file."""
        assert start is None and end is None
        return self._ask("GET", path).content

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """Writes a file here, piece by piece."""
        with self._ask("GET", rpath, stream=True) as answer, open(lpath, "wb") as out:
            for piece in answer.iter_content(_PIECE_BYTES):
                out.write(piece)


for scheme in ("http", "https"):  # the import above has put that reader in the place of the usual one
    fsspec.register_implementation(scheme, WebFiles, clobber=True)
