"""The experts of a layer in two places: some on the device, the others in the host's memory, each in its own backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

from k26_plugins.common.device_runtime import DeviceRuntime
from k26_plugins.common.experts.base import ExpertsBackend, ExpertsError, RoutedExperts, local_ids
from k26_plugins.common.experts.native import ExpertsInStream, NativeExperts
from k26_plugins.common.experts.placement import LayerPlacement
from k26_plugins.common.experts.streaming import Streaming

# Batches of at most so many tokens go into the device's stream outside a graph too, and no expert is streamed for them. With
# a longer one the host waits for the routing, and then decides which to stream.
FEW_TOKENS = 64


class HybridExperts(RoutedExperts):
    """The sum of what two backends compute, each over its own experts.

    The host's part is the longer one at decode, so it starts first, as soon as its inputs are copied, and the device's is
    launched beside it. With the native experts of a device's `runtime` both are work in the device's stream, which a CUDA
    graph may hold. Of long prompts some of the host's experts, or all, are streamed to the device and computed there.
    """

    def __init__(
        self,
        device_experts: ExpertsBackend | None,
        host_experts: ExpertsBackend,
        placement: LayerPlacement,
        device: torch.device,
        streaming: Streaming | None = None,
        runtime: DeviceRuntime | None = None,
    ) -> None:
        """Both backends hold their experts in the placement's order; `device_experts` is None where none are there.

        streaming: shared by all layers; without it the host computes whatever it holds. runtime: the device's; without it
        the host waits in every layer.
        """
        self.device = device
        self.device_map = placement.device_map().to(device)
        self.host_map = placement.host_map()
        self.host_map_on_device = self.host_map.to(device)
        self.num_host_experts = len(placement.host_ids)
        self.streaming = streaming
        self.runtime = runtime
        self.use(device_experts, host_experts)

    def use(self, device_experts: ExpertsBackend | None, host_experts: ExpertsBackend) -> None:
        """Compute with these from now on. Graphs stay right where the weights lie as they lay, as after an update."""
        self.device_experts = device_experts
        self.host_experts = host_experts
        self.stream = None if self.streaming is None else self.streaming.prepare(host_experts, self.device)
        self.in_stream = None
        if self.runtime is not None and isinstance(host_experts, NativeExperts):
            self.in_stream = ExpertsInStream(host_experts, self.host_map, self.runtime, self.device)

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
        inputs = (hidden_states, topk_ids, topk_weights)
        streamed_experts: list[int] = []
        if self.in_stream is not None and (self._are_few(len(hidden_states)) or self.in_stream.is_capturing):
            host_result = self.in_stream.submit(*inputs)
        else:
            host_result, streamed_experts = self._submit_and_stream(*inputs)
        parts = []
        if self.device_experts is not None:
            parts.append(self.device_experts.apply(*inputs, expert_map=self.device_map, workspace=workspace))
        if self.stream is not None and streamed_experts:
            parts.append(self.stream.apply(self.host_experts, streamed_experts, *inputs, self.host_map_on_device))
        total = host_result().to(hidden_states.device)
        for part in parts:
            total = total + part
        return total.to(hidden_states.dtype) if out is None else out.copy_(total)

    def _are_few(self, num_tokens: int) -> bool:
        threshold = None if self.streaming is None else self.streaming.threshold
        return num_tokens <= FEW_TOKENS and (threshold is None or num_tokens < threshold)

    def _submit_and_stream(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[Callable[[], torch.Tensor], list[int]]:
        """Start the host's part once the routing is there: what waits for it, and the experts left to the device."""
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ExpertsError(
                f"hybrid experts with {self.host_experts.name} on the CPU wait on it, which a CUDA graph cannot hold: turn "
                f"CUDA graphs off."
            )
        host_inputs = [tensor.to("cpu", non_blocking=True) for tensor in (hidden_states, topk_ids, topk_weights)]
        if hidden_states.is_cuda:
            torch.cuda.current_stream(hidden_states.device).synchronize()
        streamed_experts = self._streamed(host_inputs[1])
        host_map = self.host_map
        if streamed_experts:
            host_map = torch.where(torch.isin(host_map, torch.tensor(streamed_experts)), -1, host_map)
        return self.host_experts.submit(*host_inputs, expert_map=host_map), streamed_experts

    def _streamed(self, topk_ids: torch.Tensor) -> list[int]:
        """Places of the host's experts that this batch is streamed for."""
        if self.streaming is None or self.stream is None:
            return []
        local = local_ids(topk_ids, self.host_map, self.num_host_experts).flatten()
        counts = torch.bincount(local + 1, minlength=self.num_host_experts + 1)[1:]
        return self.streaming.choose(counts.tolist(), len(topk_ids))
