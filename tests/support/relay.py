"""Relays a client's requests to a server and adds the fields that order an answer, for clients that cannot send them.

The relay keeps the requests and the answers.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from support.server import Server

_PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens": ?(\d+)')


@dataclass
class Relay:
    """A running relay: its URL, and what it has passed on so far."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    """The requests as the client sent them."""
    answers: list[bytes] = field(default_factory=list)
    """The answers as the server sent them, with headers left out."""

    def prompt_tokens(self) -> list[int]:
        """Return the number of prompt tokens that each answer's usage gives."""
        return [int(_PROMPT_TOKENS.findall(answer)[-1]) for answer in self.answers]


@contextmanager
def relay(server: Server, orders: list[dict[str, Any]]) -> Iterator[Relay]:
    """Run a relay to `server` until the block ends. orders: the fields to add to each request, in their order."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = len(running.requests)
            running.requests.append(body)
            # A client that streams sends its next request as soon as it has read the end of this answer.
            running.answers.append(b"")
            sent = {**body, **orders[number]}
            with httpx.stream("POST", server.url + self.path, json=sent, timeout=300) as response:
                self.send_response(response.status_code)
                self.send_header("Content-Type", response.headers["Content-Type"])
                self.end_headers()
                for piece in response.iter_bytes():
                    running.answers[number] += piece
                    self.wfile.write(piece)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running = Relay(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
