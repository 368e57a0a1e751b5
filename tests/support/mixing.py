"""Runs a proxy in front of a server that mixes up requests in flight at the same time, as a faulty server would.

`k26 swarm` must find what the proxy mixed up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
from support.local_http import QuietHandler, serving

HISTORY, ANSWER = "history", "answer"


@contextmanager
def mix(url: str, what: str, *, every: int = 4) -> Iterator[str]:
    """Run a proxy of the server at `url` until the block ends, and yield its URL.

    Among the streamed chats that are in flight together with another conversation, the proxy mixes up one of `every`.
    With `what` HISTORY the server is sent the other conversation; with ANSWER the client gets the answer to the other
    conversation, with the usage and the prompt of its own. A chat that is alone passes unchanged.
    """
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

    class Handler(QuietHandler, BaseHTTPRequestHandler):  # the second base: a linter knows its methods by it
        def do_GET(self) -> None:
            response = client.get(f"{url}{self.path}")
            self.send(response.status_code, response.content)

        def do_POST(self) -> None:
            body = self.body()
            other = other_than(body)
            try:
                if other is None:
                    events = answered(body)
                elif what == HISTORY:
                    events = answered({**body, "messages": other["messages"]})
                else:
                    own, theirs = answered(body), answered({**body, "messages": other["messages"]})
                    # The first event describes the prompt; the last two are the usage and the end.
                    events = [own[0], *theirs[1:-2], *own[-2:]]
            finally:
                with lock:
                    flying.remove(body)
            self.send(200, b"".join(event + b"\n\n" for event in events))

    with client, serving(Handler) as address:
        yield address
