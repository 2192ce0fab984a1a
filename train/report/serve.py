"""A page that is made anew at every look, on this machine alone."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run_files import json_object

LOCAL = "127.0.0.1"
# A page asks every few seconds whether its runs have come further; only then it is made and drawn again.
RELOADING = """
const asked = async () => {
  try { if (await (await fetch("state")).text() !== "STATE") location.reload(); } catch { /* nobody serves any more */ }
};
setInterval(asked, 3000);
"""


def serve(places: Sequence[Path], port: int, render: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Until Ctrl-C.

    Args:
        port: 0 takes any that is free.
        render: makes the page, with this script in it.

    Raises:
        UserError: the port is taken, or may not be used.
    """

    latest = _Latest(places, render)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in (LOCAL, "localhost"):
                return self.send_error(403)  # the page of another site has asked, under a name of its own
            if self.path not in ("/", "/state"):
                return self.send_error(404)
            body = (latest.state() if self.path == "/state" else latest.page()).encode()
            with contextlib.suppress(ConnectionError):  # the reader has gone
                self.send_response(200)
                self.send_header("Content-Type", f"text/{'plain' if self.path == '/state' else 'html'}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: a line for each question of the page is too many."""

    try:
        server = ThreadingHTTPServer((LOCAL, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be used ({error}); 0 takes any that is free") from error
    with server, contextlib.suppress(KeyboardInterrupt):
        say(f"http://{LOCAL}:{server.server_port}/ shows it as it comes further; Ctrl-C ends this")
        server.serve_forever()


class _Latest:
    """The page as it was made last; a tenth of the time at most goes into making it, unless a reader asks anew."""

    def __init__(self, places: Sequence[Path], render: Callable[[str], str]):
        self._places, self._render, self._lock = places, render, threading.Lock()
        self._text, self._state, self._rest = "", "", 0.0

    def page(self) -> str:
        with self._lock:
            if (state := _state(self._places)) != self._state:
                began = time.monotonic()
                self._text, self._state = self._render(RELOADING.replace("STATE", state)), state
                self._rest = time.monotonic() + 10 * (time.monotonic() - began)
            return self._text

    def state(self) -> str:
        return self._state if time.monotonic() < self._rest else _state(self._places)


def _state(places: Sequence[Path]) -> str:
    """Another text where a run has measured something since, or does something else."""
    said = list[object]()
    for place in places:
        status = json_object(place / "STATUS")  # its other keys tell that the run lives
        said += [status.get("state"), status.get("exit_code")]
        with contextlib.suppress(OSError):
            said.append((place / "metrics.jsonl").stat().st_size)
    return str(hash(str(said)))  # it stands in a script
