"""One request: a streamed chat completion, its times, and what came back."""

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
"""Each of an answer's first tokens by its bytes, and the log-probabilities of the likeliest at its place, by theirs."""


@dataclass
class Step:
    """One request of the swarm. Times are seconds since the run began."""

    agent: int
    turn: int
    kind: str
    """`split`, `agent` or `merge`."""
    sent: float = 0.0
    first: float | None = None
    ended: float = 0.0
    late: float = 0.0
    """How long after its arrival time it was sent; open loop only."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between the pieces of the stream."""
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    prompt_digest: str | None = None
    """The hash of the prompt's token ids, where the server reports them."""
    outcome: str = OK
    """`ok`, or the kind of error."""
    detail: str = ""
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    fingerprint: Fingerprint = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.reasoning + self.content


def digest(token_ids: list[int]) -> str:
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()


@dataclass
class Client:
    """Sends the steps of one run."""

    http: httpx.AsyncClient
    url: str
    model: str
    body: dict[str, Any]
    """What every request says beside its messages."""
    began: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        return time.perf_counter() - self.began

    async def send(self, step: Step, messages: list[dict[str, Any]], *, fingerprint: bool = False) -> Step:
        """Fill in `step`. Never raises for what the server does: that is the step's outcome."""
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
    """Add a chunk to the step; whether it brought something of the answer."""
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
