"""Computes what an engine should make of a request: the core's token ids and pixels, and the reference's answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.images import image_part, png, random_image

from k26_plugins.common.model.config import K26Config
from k26_plugins.common.multimodal.image import MediaConfig, normalize, preprocess
from k26_plugins.common.prompt.chat import expand_media_placeholders, render
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.common.reference.kimi_k26 import KimiK26


@dataclass(frozen=True)
class Request:
    """A chat with one user message, and what the core makes of it."""

    content: list[dict[str, Any]]
    prompt: list[int]
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor

    def logprobs(self, reference: KimiK26, tokens: list[int]) -> torch.Tensor:
        """Return the reference's log-probabilities, `[len(tokens)]`, of the tokens that an engine answered."""
        logprobs = reference.logprobs(torch.tensor(self.prompt + tokens), self.pixel_values, self.grid_thw)
        return logprobs[len(self.prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]

    def likeliest(self, reference: KimiK26) -> int:
        """Return the token id with which the reference would begin its answer."""
        logprobs = reference.logprobs(torch.tensor(self.prompt), self.pixel_values, self.grid_thw)
        return int(logprobs[-1].argmax())


def text_prompt(folder: Path, content: str) -> list[int]:
    """Return the token ids of a chat with one user message."""
    return KimiTokenizer(folder).encode_prompt(render([{"role": "user", "content": content}], folder))


def image_request(folder: Path, sizes: list[tuple[int, int]]) -> Request:
    """Return a chat with one image for each size, width × height, and a question."""
    images = [random_image(*size, seed=index) for index, size in enumerate(sizes)]
    content = [*(image_part(png(image)) for image in images), {"type": "text", "text": "What?"}]
    config = MediaConfig.from_path(folder)
    patches, grids = preprocess([[image] for image in images], config)
    prompt = expand_media_placeholders(
        KimiTokenizer(folder).encode_prompt(render([{"role": "user", "content": content}], folder)),
        [h * w // 4 for _, h, w in grids.tolist()],
        K26Config.from_path(folder).media_placeholder_token_id,
    )
    return Request(content, prompt, torch.from_numpy(normalize(patches, config)), torch.from_numpy(grids))
