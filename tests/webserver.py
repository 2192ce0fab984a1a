"""A web server on this machine, for directories, that can be told to fail."""

import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Web:
    """Where it is, what it was asked for, and what it is to do wrong next."""

    def __init__(self, address: str):
        self.address = address
        self.asked: Counter[str] = Counter()  # "GET /name"
        self.hidden = False  # says of a file only how long it is
        self.signed = False  # allows GET alone
        self.faults: list[str] = []  # of the answers with a body to come: busy, drop (in the middle), short (so said)

    def __truediv__(self, name: str) -> str:
        return f"{self.address}/{name}"


@contextmanager
def serve(directory: Path) -> Iterator[Web]:
    """Serves a directory until the end of the block."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, directory=str(directory), **options)

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            web.asked[f"HEAD {self.path}"] += 1
            if web.signed or self.path.startswith("/loop"):
                return self.send_error(403) if web.signed else self.turn()
            super().do_HEAD()

        def turn(self) -> None:
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()

        def send_header(self, keyword: str, value: str) -> None:
            if not (web.hidden and keyword == "Last-Modified"):
                super().send_header(keyword, value)

        def do_GET(self) -> None:
            web.asked[f"GET {self.path}"] += 1
            fault = web.faults.pop(0) if web.faults else ""
            file = directory / self.path.partition("?")[0].strip("/")
            if self.path.startswith("/loop"):
                self.turn()
            elif fault == "busy":
                self.send_error(503)
            elif fault and file.is_file():
                content = file.read_bytes()
                half = content[: len(content) // 2]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content if fault == "drop" else half)))
                self.end_headers()
                self.wfile.write(half)
                self.close_connection = True
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web = Web(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
