"""Serves a chat endpoint without a model that passes every conformance case, or that has one fault put into it.

Its tokens are words. The tests of `k26 verify`'s conformance cases run against it: each fault must fail its case.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from PIL import Image
from support.conformance import ARGUMENTS
from support.endpoint import streamed
from support.local_http import QuietHandler, serving

# Image tokens by the image's size, computed by hand from the specification: a token covers 28 × 28 pixels, and an image
# that is shrunk to the limit has 4,200.
IMAGE_TOKENS = {
    (28, 28): 1,
    (57, 29): 3 * 2,
    (1000, 100): 36 * 4,
    (90, 700): 4 * 25,
    (640, 480): 23 * 18,
    (2560, 1920): 4200,
}
AROUND_AN_IMAGE = 9
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
LIMITS = {"temperature": (0, 2), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}


@dataclass
class Conforming:
    """The endpoint's behaviour: without arguments it conforms, and each field can put one fault into it."""

    ignored: frozenset[str] = frozenset()
    """Names of request parameters that the endpoint ignores."""
    refuses: bool = True
    """Whether the endpoint refuses invalid requests, as it must."""
    tokens: Callable[[tuple[int, int]], int] = field(default=lambda size: IMAGE_TOKENS[size])
    spoil: Callable[[dict[str, Any], dict[str, Any]], None] = lambda body, answer: None
    """Changes the answer in place; takes the request and its answer."""
    status: Callable[[dict[str, Any]], int] = lambda body: 200

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if (status := self.status(body)) != 200:
            return status, {"error": "scripted"}
        if self.refuses and not _is_valid(body):
            return 400, {"error": "refused"}
        body = {name: value for name, value in body.items() if name not in self.ignored}
        choices = [self._choice(body, number) for number in range(body.get("n", 1))]
        count = len(choices[0].pop("words"))
        answer = {"choices": choices, "usage": {"prompt_tokens": self._prompt_tokens(body), "completion_tokens": count}}
        self.spoil(body, answer)
        return 200, answer

    def _prompt_tokens(self, body: dict[str, Any]) -> int:
        content = body["messages"][0]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        off = not body.get("chat_template_kwargs", {}).get("thinking", True)
        count = 20 + off
        for part in parts:
            if part["type"] == "text":
                count += len(part["text"].split())
            else:
                file = base64.b64decode(part["image_url"]["url"].split(",")[1])
                count += self.tokens(Image.open(io.BytesIO(file)).size) + AROUND_AN_IMAGE
        return count

    def _choice(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        if body.get("tool_choice") == "required" and "tools" in body:
            name = body["tools"][0]["function"]["name"]
            call = {"id": f"functions.{name}:0", "function": {"name": name, "arguments": ARGUMENTS[name]}}
            return {"message": {"tool_calls": [call]}, "finish_reason": "tool_calls", "words": ["call"]}
        if "response_format" in body:
            return {"message": {"content": '{"answer": "yes"}'}, "finish_reason": "stop", "words": ["json"]}
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 64
        limit = limit if isinstance(limit, int) else 1
        words = self._words(body, number)[:limit]
        text, reason = " ".join(words), "length" if len(words) == limit else "stop"
        for stop in body.get("stop", ()):
            if stop in text:
                text, reason = text[: text.index(stop)], "stop"
        choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": reason, "words": words}
        if body.get("logprobs"):
            top = [{"token": other, "logprob": -0.5 - place} for place, other in enumerate("abc")]
            choice["logprobs"] = {"content": [{"token": word, "logprob": -0.5, "top_logprobs": top} for word in words]}
        return choice

    def _words(self, body: dict[str, Any], number: int) -> list[str]:
        if body.get("temperature", 1) == 0 or body.get("top_p", 1) < 0.01:
            penalized = any(body.get(name) for name in ("presence_penalty", "frequency_penalty"))
            return [*(WORDS[::-1] if penalized else WORDS)] * 5
        rng = random.Random(f"{body.get('seed')} {number}")
        return rng.choices(WORDS, k=40)


def _is_valid(body: dict[str, Any]) -> bool:
    offered = {tool["function"]["name"] for tool in body.get("tools", ())}
    choice = body.get("tool_choice")
    return (
        all(low <= body.get(name, 0) <= high for name, (low, high) in LIMITS.items())
        and 0 < body.get("top_p", 1) <= 1
        and isinstance(body.get("max_tokens", 1), int)
        and body.get("max_tokens", 1) > 0
        and not (choice == "required" and not offered)
        and not (isinstance(choice, dict) and choice["function"]["name"] not in offered)
    )


@contextmanager
def conforming(endpoint: Conforming) -> Iterator[str]:
    """Serve the endpoint until the block ends, and yield its URL."""

    class Handler(QuietHandler, BaseHTTPRequestHandler):  # the second base: a linter knows its methods by it
        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            self.send(200 if found else 404, json.dumps({"data": [{"id": "words"}]} if found else {}).encode())

        def do_POST(self) -> None:
            body = self.body()
            status, answer = endpoint.answer(body)
            is_stream = body.get("stream") and status == 200
            self.send(status, streamed(answer) if is_stream else json.dumps(answer).encode())

    with serving(Handler) as address:
        yield address
