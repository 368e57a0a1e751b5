"""Write and read the golden file: the reference's answers to some prompts.

It is one safetensors file, which needs neither the checkpoint nor the prompts beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.checkpoint.tensor_file import save_tensors
from k26_plugins.operate.golden.prompts import Prompt
from k26_plugins.operate.golden.state import StateError, read

FORMAT = "k26-golden-3"
KEY = "k26_golden"


class GoldenError(ValueError):
    """The error for a file that is no golden file. The message names the file and the remedy."""


@dataclass(slots=True, kw_only=True)
class GoldenPrompt:
    """One prompt with the reference's answer to it.

    It has `T` prompt tokens, `D` tokens of the answer and `R = T + D − 1` positions, at each of which the `K` likeliest
    tokens are kept. Position t holds the distribution of token t + 1 of `token_ids`.
    """

    name: str
    request: dict[str, Any]
    """`messages`, `tools` and `thinking`, or `text`; an image part of a message holds the image's index in `images`."""
    text: str
    """The rendered prompt, with one placeholder for each image."""
    num_prompt_tokens: int
    token_ids: list[int]
    """The `T` token ids of the prompt, then the `D` token ids of the reference's greedy answer."""
    top_ids: torch.Tensor
    """int64 `[R, K]`: the likeliest tokens, the likeliest first."""
    top_logprobs: torch.Tensor
    """float32 `[R, K]`: the log-probabilities of `top_ids`."""
    next_logprobs: torch.Tensor
    """float32 `[R]`: the log-probability of the token that follows each position."""
    baseline_logprobs: torch.Tensor
    """float32 `[R, K]`: the log-probabilities of `top_ids` under the bf16 baseline, the reference in bfloat16."""
    baseline_kl: torch.Tensor
    """float32 `[R]`: the bf16 baseline's KL divergence from the reference over the whole vocabulary: what rounding
    alone does."""
    experts: torch.Tensor
    """int16 `[R, MoE layers, num_experts_per_tok + NEAR]`: the experts that the router chose for each token, then the
    experts with the next best scores."""
    gaps: torch.Tensor
    """float32, in the shape of `experts`: how far each expert is inside (above zero) or outside (below zero) of the
    choice, in the router's scores."""
    suspects: dict[str, torch.Tensor] = field(default_factory=dict)
    """By the suspect's name, float32 `[n, K]`: the log-probabilities of `top_ids` at the first n positions, under a
    model with a known mistake."""
    images: list[bytes] = field(default_factory=list)
    """The bytes of the image files, as they are sent to a server."""

    @property
    def prompt(self) -> Prompt:
        """The prompt without the answer."""
        token_ids = self.token_ids[: self.num_prompt_tokens]
        return Prompt(name=self.name, request=self.request, text=self.text, token_ids=token_ids, images=self.images)


_TENSORS = ("top_ids", "top_logprobs", "next_logprobs", "baseline_logprobs", "baseline_kl", "experts", "gaps")


@dataclass(slots=True)
class Golden:
    """The content of a golden file: all prompts with their answers, and what they were computed on."""

    info: dict[str, Any]
    """`fingerprint` of the weights, `special_tokens` by name, `token_bytes` (hex) of the likeliest tokens of the
    answers, and a few values of the configuration."""
    prompts: list[GoldenPrompt]

    def tokens_by_expert(self) -> torch.Tensor:
        """Return how many tokens of the prompts and answers each expert got, int64 `[MoE layers, experts]`."""
        num_experts = int(self.info["num_experts"])
        experts, gaps = (torch.cat([getattr(prompt, name) for prompt in self.prompts]) for name in ("experts", "gaps"))
        layers = experts.shape[1]
        key = experts.long() + torch.arange(layers)[:, None] * num_experts
        return torch.bincount(key[gaps >= 0], minlength=layers * num_experts).view(layers, num_experts)

    def save(self, file: Path) -> None:
        """Write the golden file."""
        tensors: dict[str, torch.Tensor] = {}
        described: list[dict[str, Any]] = []
        for number, prompt in enumerate(self.prompts):
            described.append(
                {
                    "name": prompt.name,
                    "request": prompt.request,
                    "text": prompt.text,
                    "num_prompt_tokens": prompt.num_prompt_tokens,
                    "suspects": list(prompt.suspects),
                    "num_images": len(prompt.images),
                }
            )
            tensors[f"{number}.token_ids"] = torch.tensor(prompt.token_ids, dtype=torch.int32)
            for name in _TENSORS:
                value = getattr(prompt, name)
                tensors[f"{number}.{name}"] = value.to(torch.int32) if value.dtype == torch.int64 else value
            for name, value in prompt.suspects.items():
                tensors[f"{number}.suspect.{name}"] = value
            for index, image in enumerate(prompt.images):
                tensors[f"{number}.image.{index}"] = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        info = {"format": FORMAT, **self.info, "prompts": described}
        # All of `info` is one metadata entry, because safetensors writes several entries in any order and the same run
        # must give the same bytes.
        save_tensors(tensors, file, {KEY: json.dumps(info, ensure_ascii=False, sort_keys=True)})

    @classmethod
    def load(cls, file: Path) -> Golden:
        """Read a golden file. Raises GoldenError if it is none, or has another version's format."""
        remedy = "Make one with `k26 golden`."
        try:
            tensors, metadata = read(file)
        except StateError as error:
            raise GoldenError(f"{file} is no golden file ({error.__cause__}). {remedy}") from error
        info = json.loads(metadata.get(KEY, "{}"))
        found = info.pop("format", None)
        if found != FORMAT:
            raise GoldenError(f"{file} has the format {found!r}, expected {FORMAT!r}. {remedy}")
        try:
            prompts = [_prompt(number, entry, tensors) for number, entry in enumerate(info.pop("prompts"))]
        except KeyError as error:
            raise GoldenError(f"{file} lacks {error}. {remedy}") from error
        return cls(info, prompts)


def _prompt(number: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> GoldenPrompt:
    values = {name: tensors[f"{number}.{name}"] for name in _TENSORS}
    values["top_ids"] = values["top_ids"].long()
    return GoldenPrompt(
        name=entry["name"],
        request=entry["request"],
        text=entry["text"],
        num_prompt_tokens=entry["num_prompt_tokens"],
        token_ids=tensors[f"{number}.token_ids"].tolist(),
        suspects={name: tensors[f"{number}.suspect.{name}"] for name in entry["suspects"]},
        images=[tensors[f"{number}.image.{index}"].numpy().tobytes() for index in range(entry["num_images"])],
        **values,
    )
