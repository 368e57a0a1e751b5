"""Runs the standard library's HTTP server with a test's own handler on a free port of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class QuietHandler(BaseHTTPRequestHandler):
    """A request handler that logs nothing."""

    def body(self) -> dict[str, Any]:
        """Return the request's JSON."""
        found: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return found

    def send(self, status: int, content: bytes) -> None:
        """Send an answer. Content that begins with `data: ` is sent as server-sent events."""
        self.send_response(status)
        if content.startswith(b"data: "):
            self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def serving(handler: type[QuietHandler]) -> Iterator[str]:
    """Run a server with this handler until the block ends, and yield its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # The server looks at this interval whether it is to end: half a second, the default, would be most of a short test.
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
