"""Ask any OpenAI-compatible chat endpoint, as vendors offer them: it reports an answer's likeliest tokens, as text."""

from __future__ import annotations

from typing import Any

from k26_plugins.operate.golden import Prompt
from k26_plugins.operate.verify.endpoint import Answer, Distribution, Endpoint, Rendered

MAX_TOP = 20
"""The largest `top_logprobs` that the API allows."""


class OpenAIEndpoint(Endpoint):
    """A server of which nothing but the OpenAI chat API is known.

    Prompts are sent as messages, so a prompt of raw text cannot be asked. The prompt's own tokens are not reported.
    """

    def rendered(self, prompt: Prompt) -> Rendered:
        """Return the number of the prompt's tokens; an unknown server does not tell their ids."""
        answer = self.chat(**self.chat_request(prompt), max_tokens=1)
        return Rendered(None, int(answer["usage"]["prompt_tokens"]))

    def prompt(self, prompt: Prompt, top: int) -> dict[int, Distribution]:
        """Return nothing, because an unknown server gives no log-probabilities of a prompt."""
        return {}

    def answer(self, prompt: Prompt, count: int, top: int) -> Answer:
        """Return a greedy answer of at most `count` tokens, with the likeliest tokens at each position."""
        top = min(top, MAX_TOP)
        request = self.chat_request(prompt)
        body = self.chat(**request, max_tokens=count, temperature=0, logprobs=True, top_logprobs=top)
        return chat_answer(body, self.token_bytes)


def chat_answer(body: dict[str, Any], token_bytes: dict[bytes, int]) -> Answer:
    """Return the answer that `logprobs.content` of a chat completion holds.

    token_bytes: token ids by the tokens' bytes, for servers that report tokens as text only.
    """
    choice = body["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    distributions = []
    for entry in entries:
        reported = {_token_id(item, token_bytes): float(item["logprob"]) for item in [entry, *entry["top_logprobs"]]}
        distributions.append({token: logprob for token, logprob in reported.items() if token >= 0})
    token_ids = [_token_id(entry, token_bytes) for entry in entries]
    return Answer(token_ids, distributions, str(choice.get("finish_reason")))


def _token_id(item: dict[str, Any], token_bytes: dict[bytes, int]) -> int:
    """Return the id of a reported token; −1 for a token that `token_bytes` does not have."""
    token = str(item["token"])
    if token.startswith("token_id:"):
        return int(token.removeprefix("token_id:"))
    raw = bytes(item["bytes"]) if item.get("bytes") else token.encode()
    return token_bytes.get(raw, -1)
