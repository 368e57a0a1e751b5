"""Ask a vLLM server: text prompts are sent as token ids, prompts with images as messages.

For both, vLLM reports the distributions of the prompt's own tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

from k26_plugins.operate.golden import Prompt
from k26_plugins.operate.verify.endpoint import Answer, Distribution, Endpoint, Rendered
from k26_plugins.operate.verify.openai import chat_answer

MAX_TOP = 20
"""The most log-probabilities for a position that `--max-logprobs` allows by default."""


class VLLMEndpoint(Endpoint):
    """A vLLM server."""

    stream_ids: ClassVar[dict[str, Any]] = {"return_token_ids": True}

    def rendered(self, prompt: Prompt) -> Rendered:
        """Return the token ids of the prompt as vLLM renders it."""
        if "messages" not in prompt.request:
            body = self._complete(prompt, max_tokens=1, return_token_ids=True)
            return Rendered(body["choices"][0].get("prompt_token_ids"), int(body["usage"]["prompt_tokens"]))
        answer = self.chat(**self.chat_request(prompt), max_tokens=1, return_token_ids=True)
        return Rendered(answer.get("prompt_token_ids"), int(answer["usage"]["prompt_tokens"]))

    def prompt(self, prompt: Prompt, top: int) -> dict[int, Distribution]:
        """Return the likeliest tokens after each position of the prompt."""
        top = min(top, MAX_TOP)
        if prompt.images:
            body = self.chat(**self.chat_request(prompt), max_tokens=1, temperature=0, prompt_logprobs=top)
            entries = body["prompt_logprobs"]
        else:
            body = self._complete(prompt, max_tokens=1, prompt_logprobs=top)
            entries = body["choices"][0]["prompt_logprobs"]
        # Entry t holds the distribution of token t, which is the one after position t − 1.
        return {
            position - 1: {int(token): float(value["logprob"]) for token, value in entry.items()}
            for position, entry in enumerate(entries or [])
            if entry
        }

    def answer(self, prompt: Prompt, count: int, top: int) -> Answer:
        """Return an answer of `count` tokens, with the likeliest tokens at each position."""
        top = min(top, MAX_TOP)
        if prompt.images:
            request = self.chat_request(prompt) | {"return_tokens_as_token_ids": True, "ignore_eos": True}
            body = self.chat(**request, max_tokens=count, temperature=0, logprobs=True, top_logprobs=top)
            return chat_answer(body, {})
        body = self._complete(prompt, max_tokens=count, logprobs=top, return_tokens_as_token_ids=True, ignore_eos=True)
        choice = body["choices"][0]
        distributions = [
            {int(token.removeprefix("token_id:")): float(value) for token, value in entry.items()}
            for entry in choice["logprobs"]["top_logprobs"]
        ]
        token_ids = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        return Answer(token_ids, distributions, str(choice.get("finish_reason")))

    def _complete(self, prompt: Prompt, **body: Any) -> dict[str, Any]:
        # Raw text whose token ids are not known yet is sent as text.
        asked = prompt.token_ids or prompt.text
        return self.post("/v1/completions", model=self.model, prompt=asked, temperature=0, **body)
