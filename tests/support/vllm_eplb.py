"""One rank of two whose experts vLLM's own code moves: run in a process of its own, by tests/vllm/test_experts.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from support.experts import error, inputs, judge, make_weights, route
from vllm.distributed.eplb.eplb_communicator import TorchDistNcclEplbCommunicator
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from k26_plugins.common.experts import ExpertWeights
from k26_plugins.common.experts.base import Expert
from k26_plugins.common.experts.parameters import PACKED_NAMES
from k26_plugins.vllm.experts import K26ExpertsMethod

RANKS, LAYERS, EXPERTS, PLACES, HIDDEN, INNER = 2, 2, 8, 10, 128, 64
LOCAL = PLACES // RANKS
# A decode and a prefill.
TOKENS = (1, 70)


class Layer(torch.nn.Module):
    """What of vLLM's layer EPLB takes weights from."""

    local_num_experts = LOCAL
    get_expert_weights = RoutedExperts.get_expert_weights

    def __init__(self, moe: FusedMoEConfig, backend: str, weights: ExpertWeights, held: torch.Tensor) -> None:
        """held: the expert in each of this rank's places."""
        super().__init__()
        self.method = K26ExpertsMethod(moe, backend)
        self.method.create_weights(self, LOCAL, HIDDEN, INNER, torch.bfloat16)
        for name, field in zip(PACKED_NAMES, Expert._fields, strict=True):
            self.get_parameter(name).data.copy_(getattr(weights, field)[held])
        self.method.experts.close()


def serve(rank: int, port: int, moe: FusedMoEConfig, backends: list[str], said: Any) -> None:
    """Puts by backend the errors of what both ranks compute together, before and after the move, and how many places changed
    hands."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    said.put({backend: move(rank, moe, backend) for backend in backends})
    dist.barrier()
    dist.destroy_process_group()


def move(rank: int, moe: FusedMoEConfig, backend: str) -> tuple[list[float], list[float], int]:
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    all_weights = [make_weights(EXPERTS, HIDDEN, INNER, seed=layer) for layer in range(LAYERS)]
    # As vLLM lays them out at the start: behind all experts the copies.
    old = (torch.arange(PLACES) % EXPERTS).repeat(LAYERS, 1)
    layers = [Layer(moe, backend, weights, old[0, mine]) for weights in all_weights]

    def errors(places: torch.Tensor) -> Iterator[float]:
        expert_map = torch.full((PLACES,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(LOCAL, dtype=torch.int32)
        for layer, weights, held in zip(layers, all_weights, places, strict=True):
            for count in TOKENS:
                x, (ids, topk_weights) = inputs(count, HIDDEN), route(count, 2, EXPERTS)
                # The last place that holds an expert: a copy, where there is one.
                last = torch.stack([(held == expert).nonzero()[-1, 0] for expert in range(EXPERTS)])
                part = torch.empty_like(x)
                physical = last[ids.long()].to(torch.int32)
                layer.method.experts.apply(part, x, topk_weights, physical, expert_map)
                whole = part.float()
                dist.all_reduce(whole)
                yield error(whole, judge(weights, x, ids, topk_weights))

    before = list(errors(old))
    load = torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(0)) ** 3
    new = DefaultEplbPolicy.rebalance_experts(load, PLACES, 1, 1, RANKS, old)
    weights = [list(layer.get_expert_weights()) for layer in layers]
    buffer = [torch.empty_like(tensor) for tensor in weights[0]]
    group = dist.group.WORLD
    rearrange_expert_weights_inplace(old, new, weights, buffer, group, TorchDistNcclEplbCommunicator(group))
    return before, list(errors(new)), int((old != new).sum())
