"""The interface to a server that is verified: the requests that are sent, whichever engine answers."""

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
"""Log-probabilities of the reported tokens, by token id."""


class EndpointError(RuntimeError):
    """Raised if an endpoint cannot be asked. The message holds the endpoint's answer and the remedy."""

    def __init__(self, message: str, status: int | None = None) -> None:
        """Keep the message, and the HTTP status of the endpoint's answer if there was an answer."""
        super().__init__(message)
        self.status = status

    @property
    def is_refusal(self) -> bool:
        """Whether the endpoint refused the request (status 4xx), rather than failing itself."""
        return self.status is not None and 400 <= self.status < 500


@dataclass(slots=True)
class Rendered:
    """The prompt that the endpoint made of messages."""

    token_ids: list[int] | None
    """None if the endpoint does not report them."""
    count: int
    """Number of prompt tokens in the usage that the endpoint reports."""


@dataclass(slots=True)
class Answer:
    """A greedy answer, and the distribution that each of its tokens was taken from."""

    token_ids: list[int]
    """−1 for a token whose id could not be found out."""
    distributions: list[Distribution]
    finish_reason: str = ""


@dataclass
class Endpoint(ABC):
    """One server. Its methods raise EndpointError if it does not answer as expected."""

    url: str
    model: str
    client: httpx.Client
    engine: str
    """Name and version of the engine, as far as the server reports them."""
    token_bytes: dict[bytes, int] = field(default_factory=dict)
    """Token ids by the tokens' bytes, for endpoints that report tokens as text only."""
    reports_prompt: bool = True
    """Whether the server reports the distributions of a prompt's own tokens."""

    stream_ids: ClassVar[dict[str, Any]] = {}
    """Fields of a streamed chat's request that make the server report the prompt's token ids; empty if it cannot."""

    renders_images: bool = False
    """Whether the server reports the distributions of a prompt with images that is sent as messages.

    If not, it needs the rendered text of such a prompt.
    """

    @abstractmethod
    def rendered(self, prompt: Prompt) -> Rendered:
        """Return the prompt that the endpoint makes of the messages."""

    @abstractmethod
    def prompt(self, prompt: Prompt, top: int) -> dict[int, Distribution]:
        """Return the distribution after each position of the prompt that the endpoint reports, by position.

        top: how many of the likeliest tokens to ask for.
        """

    @abstractmethod
    def answer(self, prompt: Prompt, count: int, top: int) -> Answer:
        """Return a greedy answer of at most `count` tokens, with the distribution that each token was taken from.

        top: how many of the likeliest tokens to ask for.
        """

    def chat(self, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
        """Return the whole chat completion for these messages. body: further fields of the request."""
        return self.post("/v1/chat/completions", model=self.model, messages=messages, **body)

    def answer_as_text(self, prompt: Prompt, count: int, top: int) -> list[dict[bytes, float]]:
        """Return the log-probabilities reported for each token of a greedy answer to messages, the chosen one's first.

        Tokens go by their bytes, since every OpenAI-compatible server reports those.
        """
        request = self.chat_request(prompt)
        body = self.chat(**request, max_tokens=count, temperature=0, logprobs=True, top_logprobs=top)
        entries = (body["choices"][0].get("logprobs") or {}).get("content") or []
        return [
            {_bytes(item): float(item["logprob"]) for item in [entry, *(entry.get("top_logprobs") or [])]}
            for entry in entries
        ]

    def context_length(self) -> int | None:
        """Return the most tokens that one request may have; None if the server does not report this."""
        entries = get_json(self.client, f"{self.url}/v1/models").get("data") or []
        mine = [entry.get("max_model_len") for entry in entries if entry.get("id") == self.model]
        return int(mine[0]) if mine and mine[0] else None

    def streamed_chat(self, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
        """Send a chat for one choice as a stream, and return the choice as a client puts it together from the chunks.

        The result has `message`, `finish_reason` and `usage`. body: further fields of the request.
        """
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
                        # Moonshot's API reports the usage in the choice.
                        usage = choice.get("usage") or usage
        except (httpx.HTTPError, ValueError) as error:
            raise EndpointError(f"{self.url}: the stream of a chat cannot be read: {error}") from error
        if calls:
            message["tool_calls"] = [calls[index] for index in sorted(calls)]
        return {"message": message, "finish_reason": reason, "usage": usage}

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Post `body` as JSON to a path and return the answer's JSON. Raises EndpointError unless the status is 200."""
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
        """Return a prompt's messages, tools and thinking mode as fields of a chat request, with images as data URLs."""
        request: dict[str, Any] = {"messages": openai_messages(prompt)}
        if "tools" in prompt.request:
            request["tools"] = prompt.request["tools"]
        if not prompt.request.get("thinking", True):
            request["chat_template_kwargs"] = {"thinking": False}
        return request


def _take_in(delta: dict[str, Any], message: dict[str, Any], calls: dict[int, dict[str, Any]]) -> None:
    """Add a chunk's delta to the message and the tool calls that were collected so far."""
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
    """Return a prompt's messages as the chat API takes them, with images as data URLs."""
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
    """Return the bytes of an image file as a data URL. A file that is neither PNG nor JPEG is taken for WebP."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg" if image.startswith(b"\xff\xd8") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def get_json(client: httpx.Client, url: str) -> dict[str, Any]:
    """Return the JSON object at a URL; {} if there is none or the server does not answer."""
    try:
        response = client.get(url)
        content = response.json() if response.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
