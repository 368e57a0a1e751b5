"""Send a streamed chat completion, and record its times and its answer."""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import httpx
from httpx_sse import EventSource

OK = "ok"
TOP_LOGPROBS = 20

Fingerprint = list[tuple[bytes, dict[bytes, float]]]
"""For each token of an answer, its bytes, and the log-probabilities of the likeliest tokens at its position by their
bytes."""


@dataclass
class Step:
    """One request of the swarm and its answer. Times are seconds since the run began."""

    agent: int
    """The agent's number, `scenario.ORCHESTRATOR` for the orchestrator."""
    turn: int
    kind: str
    """`split`, `agent` or `merge`; `replay` for a step that is sent again alone, `probe` for a request before the
    run."""
    sent: float = 0.0
    first: float | None = None
    """When the first piece of the answer came; None if none came."""
    ended: float = 0.0
    late: float = 0.0
    """Seconds from the request's arrival time until it was sent; 0 in a closed loop."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between the streaming chunks that brought part of the answer."""
    prompt_tokens: int | None = None
    """None if the server reports no usage."""
    completion_tokens: int = 0
    prompt_digest: str | None = None
    """The digest of the prompt's token ids; None if the server does not report them."""
    outcome: str = OK
    """`ok`, or the kind of error."""
    detail: str = ""
    """The error's message; empty for `ok`."""
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """The answer's tool calls, in the form in which an assistant's message holds them."""
    finish_reason: str | None = None
    fingerprint: Fingerprint = field(default_factory=list)
    """Empty unless log-probabilities were requested and the server reports them."""

    @property
    def text(self) -> str:
        """The whole answer: the reasoning content, then the content."""
        return self.reasoning + self.content


def digest(token_ids: list[int]) -> str:
    """Return a hash of token ids, as a hexadecimal string."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()


@dataclass
class Client:
    """The sender of one run's requests, which all have the same options."""

    http: httpx.AsyncClient
    url: str
    model: str
    body: dict[str, Any]
    """The fields that every request has beside its messages."""
    began: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        """Return the seconds since the run began."""
        return time.perf_counter() - self.began

    async def send(self, step: Step, messages: list[dict[str, Any]], *, fingerprint: bool = False) -> Step:
        """Send `messages`, fill in `step` with times and answer, and return it.

        Errors of the server or of the connection are not raised; they become the step's outcome. fingerprint: whether
        to request log-probabilities.
        """
        body = {"model": self.model, "messages": messages, **self.body, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if fingerprint:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        step.sent = self.now()
        try:
            async with self.http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    step.outcome = f"status {response.status_code}"
                    step.detail = (await response.aread()).decode("utf-8", "replace")[:500]
                else:
                    await self._read(response, step)
        except httpx.TimeoutException:
            step.outcome, step.detail = "timeout", "no answer in time"
        except httpx.HTTPError as error:
            step.outcome, step.detail = "connection", str(error) or type(error).__name__
        except (ValueError, KeyError, TypeError) as error:
            step.outcome, step.detail = "malformed", f"{type(error).__name__}: {error}"
        step.ended = self.now()
        return step

    async def _read(self, response: httpx.Response, step: Step) -> None:
        previous = None
        async for event in EventSource(response).aiter_sse():
            if event.data == "[DONE]":
                if step.finish_reason is None:
                    step.outcome, step.detail = "cut", "the stream ended without a finish reason"
                return
            chunk = json.loads(event.data)
            if "error" in chunk:
                step.outcome, step.detail = "error in the stream", json.dumps(chunk["error"])[:500]
                return
            if _take(step, chunk):
                now = self.now()
                if previous is None:
                    step.first = now
                else:
                    step.gaps.append(now - previous)
                previous = now
        step.outcome, step.detail = "cut", "the stream ended without [DONE]"


def _take(step: Step, chunk: dict[str, Any]) -> bool:
    """Add a streaming chunk to the step. Returns whether the chunk brought part of the answer or its finish reason."""
    usage = chunk.get("usage")
    if usage:
        step.prompt_tokens = usage["prompt_tokens"]
        step.completion_tokens = usage.get("completion_tokens") or 0
    token_ids = chunk.get("prompt_token_ids") or (chunk.get("sglext") or {}).get("input_ids")
    came = False
    for choice in chunk.get("choices") or []:
        token_ids = token_ids or choice.get("prompt_token_ids")
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning") or delta.get("reasoning_content") or ""
        content = delta.get("content") or ""
        step.reasoning += reasoning
        step.content += content
        for piece in delta.get("tool_calls") or []:
            _take_call(step.calls, piece)
        step.finish_reason = choice.get("finish_reason") or step.finish_reason
        for entry in (choice.get("logprobs") or {}).get("content") or []:
            listed = {_bytes(item): float(item["logprob"]) for item in [entry, *(entry.get("top_logprobs") or [])]}
            step.fingerprint.append((_bytes(entry), listed))
        came = came or bool(reasoning or content or delta.get("tool_calls") or choice.get("finish_reason"))
    if token_ids:
        step.prompt_digest = digest(token_ids)
    return came


def _take_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    index = piece.get("index", 0)
    while len(calls) <= index:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[index], piece.get("function") or {}
    call["id"] = piece.get("id") or call["id"]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _bytes(item: dict[str, Any]) -> bytes:
    return bytes(item["bytes"]) if item.get("bytes") else str(item["token"]).encode()
