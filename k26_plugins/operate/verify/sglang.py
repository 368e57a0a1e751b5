"""Ask an SGLang server, or KTransformers' server, which is a fork of SGLang.

SGLang's own `/generate` reports distributions of prompts, which its OpenAI API does not.
"""

from __future__ import annotations

from typing import Any, ClassVar

from k26_plugins.operate.golden import Prompt
from k26_plugins.operate.verify.endpoint import Answer, Distribution, Endpoint, Rendered, data_url


class SGLangEndpoint(Endpoint):
    """An SGLang server."""

    stream_ids: ClassVar[dict[str, Any]] = {"return_input_ids_in_sglext": True}

    def rendered(self, prompt: Prompt) -> Rendered:
        """Return the token ids of the prompt as SGLang renders it."""
        if "messages" not in prompt.request:
            info = self._generate(prompt, 1, 1, logprob_start_len=0)
            return Rendered([int(token) for _, token, *_ in info["input_token_logprobs"]], int(info["prompt_tokens"]))
        answer = self.chat(**self.chat_request(prompt), max_tokens=1, return_prompt_token_ids=True)
        token_ids = answer["choices"][0].get("prompt_token_ids")
        return Rendered(token_ids, int(answer["usage"]["prompt_tokens"]))

    def prompt(self, prompt: Prompt, top: int) -> dict[int, Distribution]:
        """Return the likeliest tokens after each position of the prompt."""
        info = self._generate(prompt, 1, top, logprob_start_len=0)
        entries = info["input_top_logprobs"]
        return {position - 1: _distribution(entry) for position, entry in enumerate(entries) if entry}

    def answer(self, prompt: Prompt, count: int, top: int) -> Answer:
        """Return an answer of `count` tokens, with the likeliest tokens at each position."""
        info = self._generate(prompt, count, top)
        token_ids = [int(token) for _, token, *_ in info["output_token_logprobs"]]
        reason = info.get("finish_reason") or {}
        return Answer(
            token_ids, [_distribution(entry) for entry in info["output_top_logprobs"]], str(reason.get("type"))
        )

    def _generate(self, prompt: Prompt, count: int, top: int, **body: Any) -> dict[str, Any]:
        if prompt.images:
            body |= {"text": prompt.text, "image_data": [data_url(image) for image in prompt.images]}
        elif prompt.token_ids:
            body["input_ids"] = prompt.token_ids
        else:
            body["text"] = prompt.text
        sampling = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        answer = self.post("/generate", sampling_params=sampling, return_logprob=True, top_logprobs_num=top, **body)
        info: dict[str, Any] = answer["meta_info"]
        return info


def _distribution(entry: list[list[Any]]) -> Distribution:
    return {int(token): float(logprob) for logprob, token, *_ in entry}
