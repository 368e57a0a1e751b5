"""INT4 experts with random weights, of a configuration's sizes, for what is tested or timed without a checkpoint."""

from __future__ import annotations

import torch

from k26_plugins.common.experts import ExpertWeights
from k26_plugins.common.model.config import TextConfig
from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR


def random_experts(text: TextConfig, count: int) -> ExpertWeights:
    """`count` experts, the same at each call."""
    hidden, inner = text.hidden_size, text.moe_intermediate_size
    generator = torch.Generator().manual_seed(0)

    def packed(rows: int, inputs: int) -> torch.Tensor:
        shape = (count, rows, inputs // PACK_FACTOR)
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)

    def scale(rows: int, inputs: int) -> torch.Tensor:
        shape = (count, rows, inputs // GROUP_SIZE)
        return (torch.rand(shape, generator=generator) * 0.01).to(torch.bfloat16)

    wide = (2 * inner, hidden)
    return ExpertWeights(packed(*wide), scale(*wide), packed(hidden, inner), scale(hidden, inner))
