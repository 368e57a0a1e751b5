"""INT4 experts with random weights, for what is tested or timed without a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR


def random_experts(count: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> ExpertWeights:
    """`count` experts, the same at each call on a kind of device.

    Any bits are weights; scales are such that a unit activation gives a unit output.
    """
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn: dict[str, Any] = {"generator": generator, "device": device}
        packed = torch.randint(-(2**31), 2**31 - 1, (count, rows, inputs // PACK_FACTOR), dtype=torch.int32, **drawn)
        scale = torch.rand(count, rows, inputs // GROUP_SIZE, **drawn) + 0.5
        return packed, (scale / (4.6 * inputs**0.5)).to(torch.bfloat16)

    return ExpertWeights(*matrix(2 * intermediate_size, hidden_size), *matrix(hidden_size, intermediate_size))
