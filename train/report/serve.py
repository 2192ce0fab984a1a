"""A page that is made anew at every look, on this machine alone."""

import contextlib
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mixtral_jax.train.errors import UserError

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

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in (LOCAL, "localhost"):
                return self.send_error(403)  # the page of another site has asked, under a name of its own
            if self.path not in ("/", "/state"):
                return self.send_error(404)
            state = _state(places)
            text = state if self.path == "/state" else render(RELOADING.replace("STATE", state))
            body = text.encode()
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


def _state(places: Sequence[Path]) -> str:
    """Another text where a run has written something since."""
    said = list[str]()
    for place in places:
        for name in ("metrics.jsonl", "STATUS"):
            with contextlib.suppress(OSError):
                stat = (place / name).stat()
                said.append(f"{stat.st_size}-{stat.st_mtime_ns}")
    return " ".join(said)
