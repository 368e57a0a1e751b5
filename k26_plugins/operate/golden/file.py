"""The golden file: what the reference answers to some prompts, in one safetensors file that stands alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.checkpoint.tensor_file import save_tensors
from k26_plugins.operate.golden.prompts import Prompt
from k26_plugins.operate.golden.state import StateError, read

FORMAT = "k26-golden-2"
KEY = "k26_golden"


class GoldenError(ValueError):
    """A file that is no golden file. The message names it and the remedy."""


@dataclass(slots=True, kw_only=True)
class GoldenPrompt:
    """One prompt with its answer. `T` prompt tokens, `D` tokens of the answer, `R = T + D − 1` positions, `K` kept tokens.

    Position t holds the distribution of token t + 1 of `token_ids`.
    """

    name: str
    request: dict[str, Any]
    """`messages` (an image part holds its number in `images`), `tools`, `thinking`; or `text`."""
    text: str
    """Rendered, with one placeholder for each image."""
    num_prompt_tokens: int
    token_ids: list[int]
    """`T + D`: the prompt, then what the reference answers greedily."""
    top_ids: torch.Tensor
    """int64 `[R, K]`, the likeliest tokens in order."""
    top_logprobs: torch.Tensor
    """float32 `[R, K]`."""
    next_logprobs: torch.Tensor
    """float32 `[R]`, of the token that follows."""
    twin_logprobs: torch.Tensor
    """float32 `[R, K]`: the same tokens' under the reference in bfloat16."""
    twin_kl: torch.Tensor
    """float32 `[R]`: KL of that over the whole vocabulary, which is what rounding does."""
    experts: torch.Tensor
    """int16 `[R, MoE layers, K + N]`: where each token was routed, then the experts that came next."""
    gaps: torch.Tensor
    """float32, likewise: how far each is inside (above zero) or outside of the choice, in the router's scores."""
    suspects: dict[str, torch.Tensor] = field(default_factory=dict)
    """float32 `[n, K]`: the same tokens' log-probabilities at the first n positions, under a model with a known mistake."""
    images: list[bytes] = field(default_factory=list)
    """The files' bytes, as they are sent."""

    @property
    def prompt(self) -> Prompt:
        """The prompt alone."""
        token_ids = self.token_ids[: self.num_prompt_tokens]
        return Prompt(name=self.name, request=self.request, text=self.text, token_ids=token_ids, images=self.images)


_TENSORS = ("top_ids", "top_logprobs", "next_logprobs", "twin_logprobs", "twin_kl", "experts", "gaps")


@dataclass(slots=True)
class Golden:
    """All prompts, and what they were computed on."""

    info: dict[str, Any]
    """`fingerprint` of the weights, `special_tokens` by name, `token_bytes` (hex) of the ids that answers hold, and more."""
    prompts: list[GoldenPrompt]

    def tokens_by_expert(self) -> torch.Tensor:
        """int64 `[MoE layers, experts]`: how many tokens of the prompts and answers each expert saw."""
        num_experts = int(self.info["num_experts"])
        experts, gaps = (torch.cat([getattr(prompt, name) for prompt in self.prompts]) for name in ("experts", "gaps"))
        layers = experts.shape[1]
        key = experts.long() + torch.arange(layers)[:, None] * num_experts
        return torch.bincount(key[gaps >= 0], minlength=layers * num_experts).view(layers, num_experts)

    def save(self, file: Path) -> None:
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
        # One entry only: safetensors writes several in any order, and the same run shall give the same bytes.
        save_tensors(tensors, file, {KEY: json.dumps(info, ensure_ascii=False, sort_keys=True)})

    @classmethod
    def load(cls, file: Path) -> Golden:
        """Read a golden file. Raises GoldenError."""
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
