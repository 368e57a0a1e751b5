"""Make INT4 experts with random weights, for tests and timings that have no checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR


def random_experts(count: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> ExpertWeights:
    """Return `count` experts with random weights; calls with the same sizes and kind of device return the same weights.

    The packed weights are random bits, since any bits are valid INT4 weights. The bfloat16 scales are such that each
    matrix turns activations of unit variance into outputs of about unit variance.
    """
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn: dict[str, Any] = {"generator": generator, "device": device}
        packed = torch.randint(-(2**31), 2**31 - 1, (count, rows, inputs // PACK_FACTOR), dtype=torch.int32, **drawn)
        scale = torch.rand(count, rows, inputs // GROUP_SIZE, **drawn) + 0.5
        return packed, (scale / (4.6 * inputs**0.5)).to(torch.bfloat16)

    return ExpertWeights(*matrix(2 * intermediate_size, hidden_size), *matrix(hidden_size, intermediate_size))
