"""The experts of a layer in two places: some on the device, the others in the host's memory, each in its own backend."""

from __future__ import annotations

import torch

from k26_plugins.common.experts.base import ExpertsBackend, ExpertsError, RoutedExperts
from k26_plugins.common.experts.placement import LayerPlacement


class HybridExperts(RoutedExperts):
    """The sum of what two backends compute, each over its own experts.

    The host's part is the longer one at decode, so it starts first, as soon as its inputs are copied, and the device's is
    launched beside it. The host waits for the copy, so a CUDA graph cannot hold this.
    """

    def __init__(
        self,
        device_experts: ExpertsBackend | None,
        host_experts: ExpertsBackend,
        placement: LayerPlacement,
        device: torch.device,
    ) -> None:
        """Both backends hold their experts in the placement's order; `device_experts` is None where none are there."""
        self.device_experts = device_experts
        self.host_experts = host_experts
        self.device_map = placement.device_map().to(device)
        self.host_map = placement.host_map()

    def apply(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if expert_map is not None:
            raise ExpertsError("hybrid experts place global ids themselves and take no expert map: run without EP.")
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ExpertsError("hybrid experts wait on the host, which a CUDA graph cannot hold: turn CUDA graphs off.")
        host_inputs = [tensor.to("cpu", non_blocking=True) for tensor in (hidden_states, topk_ids, topk_weights)]
        if hidden_states.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
            copied.synchronize()
        host_result = self.host_experts.submit(*host_inputs, expert_map=self.host_map)
        on_device = None
        if self.device_experts is not None:
            on_device = self.device_experts.apply(
                hidden_states, topk_ids, topk_weights, expert_map=self.device_map, workspace=workspace
            )
        total = host_result().to(hidden_states.device)
        if on_device is not None:
            total = total + on_device
        return total if out is None else out.copy_(total)
