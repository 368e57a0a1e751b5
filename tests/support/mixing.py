"""A proxy before a server that mixes up requests which are in flight at once, as a faulty server would."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

HISTORY, ANSWER = "history", "answer"


@contextmanager
def mix(url: str, what: str, *, every: int = 4) -> Iterator[str]:
    """The proxy's address. Every so many streamed chats get another one's conversation (HISTORY), or another one's answer
    with the right usage and prompt (ANSWER). A chat that is alone passes unchanged."""
    lock = threading.Lock()
    flying: list[dict[str, Any]] = []
    sent = 0

    def other_than(body: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal sent
        with lock:
            others = [other for other in flying if other["messages"] != body["messages"]]
            flying.append(body)
            sent += bool(others)
            return others[-1] if others and sent % every == 0 else None

    client = httpx.Client(timeout=120)

    def answered(body: dict[str, Any]) -> list[bytes]:
        response = client.post(f"{url}/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return [line for line in response.content.split(b"\n\n") if line]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            response = client.get(f"{url}{self.path}")
            self._send(response.status_code, response.content)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            other = other_than(body)
            try:
                if other is None:
                    events = answered(body)
                elif what == HISTORY:
                    events = answered({**body, "messages": other["messages"]})
                else:
                    own, theirs = answered(body), answered({**body, "messages": other["messages"]})
                    # The first event tells of the prompt, the two last are the usage and the end.
                    events = [own[0], *theirs[1:-2], *own[-2:]]
            finally:
                with lock:
                    flying.remove(body)
            self._send(200, b"".join(event + b"\n\n" for event in events))

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        client.close()
