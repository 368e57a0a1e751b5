"""A proxy before a server that mixes up requests which are in flight at once, as a faulty server would."""

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
    """The address of a proxy, which gives every so many streamed chats another one's conversation (HISTORY), or another
    one's answer with the right usage and prompt (ANSWER). A chat that is alone passes unchanged."""
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
                    # The first event tells of the prompt, the two last are the usage and the end.
                    events = [own[0], *theirs[1:-2], *own[-2:]]
            finally:
                with lock:
                    flying.remove(body)
            self.send(200, b"".join(event + b"\n\n" for event in events))

    with client, serving(Handler) as address:
        yield address
