"""The experts of a layer in two places: some on the device, the others in the host's memory, each in its own backend."""

from __future__ import annotations

import torch

from k26_plugins.common.experts.base import ExpertsBackend, ExpertsError, RoutedExperts, local_ids
from k26_plugins.common.experts.placement import LayerPlacement
from k26_plugins.common.experts.streaming import Streaming


class HybridExperts(RoutedExperts):
    """The sum of what two backends compute, each over its own experts.

    The host's part is the longer one at decode, so it starts first, as soon as its inputs are copied, and the device's is
    launched beside it. Of long prompts some of the host's experts, or all, are streamed to the device and computed there.
    The host waits for the copy of the inputs, so a CUDA graph cannot hold this.
    """

    def __init__(
        self,
        device_experts: ExpertsBackend | None,
        host_experts: ExpertsBackend,
        placement: LayerPlacement,
        device: torch.device,
        streaming: Streaming | None = None,
    ) -> None:
        """Both backends hold their experts in the placement's order; `device_experts` is None where none are there.

        streaming: shared by all layers; without it the host computes whatever it holds.
        """
        self.device_experts = device_experts
        self.host_experts = host_experts
        self.device_map = placement.device_map().to(device)
        self.host_map = placement.host_map()
        self.host_map_on_device = self.host_map.to(device)
        self.num_host_experts = len(placement.host_ids)
        self.streaming = streaming
        self.stream = None if streaming is None else streaming.prepare(host_experts, device)

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
            torch.cuda.current_stream(hidden_states.device).synchronize()
        streamed_experts = self._streamed(host_inputs[1])
        host_map = self.host_map
        if streamed_experts:
            host_map = torch.where(torch.isin(host_map, torch.tensor(streamed_experts)), -1, host_map)
        host_result = self.host_experts.submit(*host_inputs, expert_map=host_map)
        parts = []
        if self.device_experts is not None:
            parts.append(
                self.device_experts.apply(
                    hidden_states, topk_ids, topk_weights, expert_map=self.device_map, workspace=workspace
                )
            )
        if self.stream is not None and streamed_experts:
            inputs = (hidden_states, topk_ids, topk_weights, self.host_map_on_device)
            parts.append(self.stream.apply(self.host_experts, streamed_experts, *inputs))
        total = host_result().to(hidden_states.device)
        for part in parts:
            total = total + part
        return total.to(hidden_states.dtype) if out is None else out.copy_(total)

    def _streamed(self, topk_ids: torch.Tensor) -> list[int]:
        """Places of the host's experts that this batch is streamed for."""
        if self.streaming is None or self.stream is None:
            return []
        local = local_ids(topk_ids, self.host_map, self.num_host_experts).flatten()
        counts = torch.bincount(local + 1, minlength=self.num_host_experts + 1)[1:]
        return self.streaming.choose(counts.tolist(), len(topk_ids))
