"""Provides SGLang's part of `support.eplb`: its algorithm for EPLB, and its transfer of a layer's weights."""

from __future__ import annotations

import torch
from sglang.srt.eplb.eplb_algorithms.deepseek import rebalance_experts
from sglang.srt.eplb.expert_location_updater import create_temp_buffers, update_expert_weights_single_layer
from support.eplb import LOCAL, PLACES, RANKS

Layer = torch.nn.Module


def rebalanced(load: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return the expert in each slot after rebalancing, `[layers, slots]`, from each expert's load, `[layers,
    experts]`."""
    new: torch.Tensor = rebalance_experts(load, PLACES, 1, 1, RANKS, False)[0]
    return new


def move(layers: list[torch.nn.Module], old: torch.Tensor, new: torch.Tensor, rank: int) -> None:
    """Take part, as `rank`, in moving experts between the slots. old, new: the expert in each slot, `[layers,
    slots]`."""
    for number, one in enumerate(layers):
        # The in-tree model, too, gives EPLB the layer's parameters.
        weights = [parameter.data[:LOCAL] for _, parameter in one.named_parameters()]
        places = (old[number].tolist(), new[number].tolist())
        update_expert_weights_single_layer(weights, create_temp_buffers(weights), *places, LOCAL, RANKS, rank)
