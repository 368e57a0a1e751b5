"""Provides vLLM's part of `support.eplb`: what it takes for a layer's weights, its policy, and its transfer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from support.eplb import LOCAL, PLACES, RANKS
from vllm.distributed.eplb.eplb_communicator import TorchDistNcclEplbCommunicator
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


class Layer(torch.nn.Module):
    """The part of vLLM's MoE layer from which EPLB takes the weights."""

    local_num_experts = LOCAL
    get_expert_weights = RoutedExperts.get_expert_weights


def rebalanced(load: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return the expert in each slot after rebalancing, `[layers, slots]`, from each expert's load, `[layers,
    experts]`."""
    new: torch.Tensor = DefaultEplbPolicy.rebalance_experts(load, PLACES, 1, 1, RANKS, old)
    return new


def move(layers: list[Layer], old: torch.Tensor, new: torch.Tensor, rank: int) -> None:
    """Take part, as `rank`, in moving experts between the slots. old, new: the expert in each slot, `[layers,
    slots]`."""
    weights = [list(one.get_expert_weights()) for one in layers]
    buffer = [torch.empty_like(tensor) for tensor in weights[0]]
    group = dist.group.WORLD
    rearrange_expert_weights_inplace(old, new, weights, buffer, group, TorchDistNcclEplbCommunicator(group))
