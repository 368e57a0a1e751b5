"""SGLang's part of `support.eplb`: its algorithm, and its transfer of a layer."""

from __future__ import annotations

import torch
from sglang.srt.eplb.eplb_algorithms.deepseek import rebalance_experts
from sglang.srt.eplb.expert_location_updater import create_temp_buffers, update_expert_weights_single_layer
from support.eplb import LOCAL, PLACES, RANKS

Layer = torch.nn.Module


def rebalanced(load: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    new: torch.Tensor = rebalance_experts(load, PLACES, 1, 1, RANKS, False)[0]
    return new


def move(layers: list[torch.nn.Module], old: torch.Tensor, new: torch.Tensor, rank: int) -> None:
    for number, one in enumerate(layers):
        # The in-tree model names them so to EPLB.
        weights = [parameter.data[:LOCAL] for _, parameter in one.named_parameters()]
        places = (old[number].tolist(), new[number].tolist())
        update_expert_weights_single_layer(weights, create_temp_buffers(weights), *places, LOCAL, RANKS, rank)
