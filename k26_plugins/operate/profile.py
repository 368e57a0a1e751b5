"""Count which experts a workload uses, by running its prompts through the reference model and its router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.experts.placement import Profile
from k26_plugins.common.reference.decoder import MoE
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.operate.golden.prompts import Prompt, pixels


class CountingMoE(MoE):
    """The reference's MoE layer, which also counts how often its router chose each expert."""

    counts: torch.Tensor
    """int64 `[n_routed_experts]`: how many tokens chose each expert."""

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts as the reference does, and count them."""
        topk_weights, topk_ids = super().choose(x)
        self.counts += torch.bincount(topk_ids.flatten(), minlength=len(self.counts))
        return topk_weights, topk_ids


def profile_experts(folder: Path, prompts: list[Prompt], on_prompt: Callable[[], None]) -> Profile:
    """Return how often each expert is chosen when the reference model of the checkpoint in `folder` runs the prompts.

    The prompts must be tokenized (`read_prompts`). `on_prompt` is called after each prompt. Raises CheckpointError and
    MediaError.
    """
    model = KimiK26(Checkpoint(folder))
    num_experts = model.config.text.n_routed_experts
    for block in model.text.layers:
        if isinstance(block.mlp, MoE):
            block.mlp.__class__ = CountingMoE
            cast(CountingMoE, block.mlp).counts = torch.zeros(num_experts, dtype=torch.int64)
    for prompt in prompts:
        media = pixels(prompt, folder)[:2] if prompt.images else ()
        model.logprobs(torch.tensor(prompt.token_ids), *media)
        on_prompt()
    counts = [
        block.mlp.counts.tolist() if isinstance(block.mlp, CountingMoE) else [0] * num_experts
        for block in model.text.layers
    ]
    return Profile(sum(len(prompt.token_ids) for prompt in prompts), counts)
