"""What an endpoint is asked, whatever engine is behind it."""

from __future__ import annotations

import base64
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from httpx_sse import EventSource

from k26_plugins.operate.golden import Prompt

Distribution = dict[int, float]
"""Log-probabilities of the tokens that were reported, by token id."""


class EndpointError(RuntimeError):
    """An endpoint that cannot be asked. The message holds what it answered and the remedy."""

    def __init__(self, message: str, status: int | None = None) -> None:
        """status: of its HTTP answer, where there was one."""
        super().__init__(message)
        self.status = status

    @property
    def is_refusal(self) -> bool:
        """Whether the endpoint found fault with the request, and none with itself."""
        return self.status is not None and 400 <= self.status < 500


@dataclass(slots=True)
class Rendered:
    """What the endpoint made of messages."""

    token_ids: list[int] | None
    count: int
    """Prompt tokens, as billed."""


@dataclass(slots=True)
class Answer:
    """A greedy answer and where its tokens came from."""

    token_ids: list[int]
    """−1 for a token that could not be told."""
    distributions: list[Distribution]
    finish_reason: str = ""


@dataclass
class Endpoint(ABC):
    """One server. Methods raise EndpointError."""

    url: str
    model: str
    client: httpx.Client
    engine: str
    """Name and version, as far as it says."""
    token_bytes: dict[bytes, int] = field(default_factory=dict)
    """Token ids by their bytes, for endpoints that report text only."""
    reports_prompt: bool = True
    """Whether it gives the distributions of a prompt's own tokens."""

    stream_ids: ClassVar[dict[str, Any]] = {}
    """What to ask for with a streamed chat so that it reports its prompt's token ids; nothing where it cannot."""

    renders_images: bool = False
    """Whether it reports prompts with images from messages alone."""

    @abstractmethod
    def rendered(self, prompt: Prompt) -> Rendered:
        """The prompt of the messages, as the endpoint renders them."""

    @abstractmethod
    def prompt(self, prompt: Prompt, top: int) -> dict[int, Distribution]:
        """The distribution after each position of the prompt that the endpoint reports."""

    @abstractmethod
    def answer(self, prompt: Prompt, count: int, top: int) -> Answer:
        """At most `count` tokens, greedy, with the distribution that each was taken from."""

    def chat(self, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
        return self.post("/v1/chat/completions", model=self.model, messages=messages, **body)

    def answer_as_text(self, prompt: Prompt, count: int, top: int) -> list[dict[bytes, float]]:
        """The log-probabilities reported for each token of a greedy answer to messages, the chosen token's first.

        By bytes: the one name of a token that every OpenAI-compatible server gives.
        """
        request = self.chat_request(prompt)
        body = self.chat(**request, max_tokens=count, temperature=0, logprobs=True, top_logprobs=top)
        entries = (body["choices"][0].get("logprobs") or {}).get("content") or []
        return [
            {_bytes(item): float(item["logprob"]) for item in [entry, *(entry.get("top_logprobs") or [])]}
            for entry in entries
        ]

    def context_length(self) -> int | None:
        """Tokens of one request that the server takes, None where it does not say."""
        entries = get_json(self.client, f"{self.url}/v1/models").get("data") or []
        mine = [entry.get("max_model_len") for entry in entries if entry.get("id") == self.model]
        return int(mine[0]) if mine and mine[0] else None

    def streamed_chat(self, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
        """A chat's first choice as its stream gives it, put together as a client does: message, stop reason and usage."""
        message: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        reason, usage = None, None
        request = {"model": self.model, "messages": messages, "stream": True, **body}
        try:
            with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=request) as response:
                if response.status_code != 200:
                    answer = response.read().decode(errors="replace")[:500]
                    raise EndpointError(
                        f"{self.url} answered {response.status_code} to a streamed chat: {answer}", response.status_code
                    )
                for event in EventSource(response).iter_sse():
                    if event.data == "[DONE]":
                        continue
                    chunk = json.loads(event.data)
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or []:
                        _take_in(choice.get("delta") or {}, message, calls)
                        reason = choice.get("finish_reason") or reason
                        # Where Moonshot's API has it.
                        usage = choice.get("usage") or usage
        except (httpx.HTTPError, ValueError) as error:
            raise EndpointError(f"{self.url}: the stream of a chat cannot be read: {error}") from error
        if calls:
            message["tool_calls"] = [calls[index] for index in sorted(calls)]
        return {"message": message, "finish_reason": reason, "usage": usage}

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        try:
            response = self.client.post(f"{self.url}{path}", json=body)
        except httpx.HTTPError as error:
            raise EndpointError(
                f"{self.url}{path}: {error or type(error).__name__}. Is the server still up?"
            ) from error
        if response.status_code != 200:
            message = f"{self.url}{path} answered {response.status_code}: {response.text[:500]}"
            raise EndpointError(message, response.status_code)
        content: dict[str, Any] = response.json()
        return content

    def chat_request(self, prompt: Prompt) -> dict[str, Any]:
        """`messages`, `tools` and thinking of a prompt as the chat API takes them, images as data URLs."""
        request: dict[str, Any] = {"messages": openai_messages(prompt)}
        if "tools" in prompt.request:
            request["tools"] = prompt.request["tools"]
        if not prompt.request.get("thinking", True):
            request["chat_template_kwargs"] = {"thinking": False}
        return request


def _take_in(delta: dict[str, Any], message: dict[str, Any], calls: dict[int, dict[str, Any]]) -> None:
    for name in ("content", "reasoning", "reasoning_content"):
        if delta.get(name):
            message[name] = message.get(name, "") + delta[name]
    for part in delta.get("tool_calls") or []:
        call = calls.setdefault(part["index"], {"id": None, "function": {"name": "", "arguments": ""}})
        call["id"] = call["id"] or part.get("id")
        for name in ("name", "arguments"):
            call["function"][name] += (part.get("function") or {}).get(name) or ""


def _bytes(item: dict[str, Any]) -> bytes:
    return bytes(item["bytes"]) if item.get("bytes") else str(item["token"]).encode()


def openai_messages(prompt: Prompt) -> list[dict[str, Any]]:
    messages = []
    for message in prompt.request["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = [_part(part, prompt.images) for part in content]
        messages.append({**message, "content": content})
    return messages


def _part(part: dict[str, Any], images: list[bytes]) -> dict[str, Any]:
    return (
        {"type": "image_url", "image_url": {"url": data_url(images[part["image"]])}}
        if part["type"] == "image"
        else part
    )


def data_url(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg" if image.startswith(b"\xff\xd8") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def get_json(client: httpx.Client, url: str) -> dict[str, Any]:
    """What a path answers as a JSON object, {} where there is no such thing."""
    try:
        response = client.get(url)
        content = response.json() if response.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
