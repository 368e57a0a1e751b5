"""Compute a layer's experts in two places, some on the device and the others in host memory, each by a backend."""

from __future__ import annotations

import torch

from k26_plugins.common.experts.base import (
    ExpertsBackend,
    ExpertsError,
    ExpertWeights,
    RoutedExperts,
    check_shapes,
    local_ids,
)
from k26_plugins.common.experts.deferred import Deferral, Result
from k26_plugins.common.experts.native import ExpertsInStream, NativeExperts
from k26_plugins.common.experts.placement import LayerPlacement
from k26_plugins.common.experts.streaming import Streaming
from k26_plugins.common.host.device_runtime import DeviceRuntime

# Batches of at most so many tokens are work in the device's stream even outside a CUDA graph, and no expert is streamed
# for them. For a longer batch the host waits for the routing and then decides which experts to stream.
FEW_TOKENS = 64


class HybridExperts(RoutedExperts):
    """A layer's routed experts in two backends, each over its own experts, whose results are added.

    The host's part takes longer at decode, so it starts first, as soon as its inputs are copied, and the device's part
    is launched beside it. If the host's experts are native and a `runtime` is given, both parts are work in the
    device's stream, which a CUDA graph may hold. For long prompts some or all of the host's experts are streamed to the
    device and computed there.
    """

    def __init__(
        self,
        device_experts: ExpertsBackend | None,
        host_experts: ExpertsBackend,
        placement: LayerPlacement,
        device: torch.device,
        streaming: Streaming | None = None,
        runtime: DeviceRuntime | None = None,
        deferral: Deferral | None = None,
        layer: int = 0,
    ) -> None:
        """Combine two backends that hold their experts in the placement's order.

        device_experts: None if the device has no expert of this layer. streaming: shared by all layers; without it the
        host computes all the experts that it holds. runtime: the device's; without it the host waits in every layer.
        deferral: shared by all layers; without it each layer adds all of its own experts. layer: this layer's number.
        """
        self.device = device
        self.placement = placement
        # How often each expert was chosen, by its global id.
        self.counts = torch.zeros(len(placement.device_ids) + len(placement.host_ids), dtype=torch.int64)
        self.device_map = placement.device_map().to(device)
        self.host_map = placement.host_map()
        self.host_map_on_device = self.host_map.to(device)
        self.num_host_experts = len(placement.host_ids)
        self.streaming = streaming
        self.runtime = runtime
        self.deferral, self.layer = deferral, layer
        self.use(device_experts, host_experts)

    def use(self, device_experts: ExpertsBackend | None, host_experts: ExpertsBackend) -> None:
        """Compute with these backends from now on.

        CUDA graphs stay valid if the weights are at the same addresses as before, as they are after an update.
        """
        self.device_experts = device_experts
        self.host_experts = host_experts
        self.stream = None if self.streaming is None else self.streaming.prepare(host_experts, self.device)
        self.in_stream = None
        if self.runtime is not None and isinstance(host_experts, NativeExperts):
            self.in_stream = ExpertsInStream(host_experts, self.host_map, self.counts, self.runtime, self.device)

    def exchange(self, leaves: int, comes: int) -> None:
        """Move the expert `comes` to the device, in the place of `leaves`, which moves to the host.

        Both are global ids. The contents of memory change, but no addresses, so that CUDA graphs stay valid.
        Nothing may be running meanwhile. Raises ExpertsError if a backend keeps its weights to itself.
        """
        assert self.device_experts is not None, "the one that leaves is there"
        (_, there), (_, here) = self.placement.places[leaves], self.placement.places[comes]
        leaving = self.device_experts.restore(_row(self.device_experts, there))
        coming = self.host_experts.restore(_row(self.host_experts, here))
        _fill(self.device_experts, there, coming.to(self.device))
        _fill(self.host_experts, here, leaving.to(torch.device("cpu")))
        self.placement = self.placement.exchanged(leaves, comes)
        self.device_map.copy_(self.placement.device_map())
        self.host_map.copy_(self.placement.host_map())
        self.host_map_on_device.copy_(self.host_map)

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
        """Return the sum of the device's, the host's and the streamed experts; arguments as for `RoutedExperts.apply`.

        Raises ExpertsError for an expert map, because the placement has its own maps, and for tensors of another shape.
        """
        if expert_map is not None:
            raise ExpertsError("hybrid experts place global ids themselves and take no expert map: run without EP.")
        inputs = (hidden_states, topk_ids, topk_weights)
        check_shapes(self.host_experts.sizes.hidden_size, *inputs, out=out)
        are_few = self._are_few(len(hidden_states))
        in_stream = self.in_stream if self.in_stream is not None and (are_few or self.in_stream.is_capturing) else None
        streamed_experts: list[int] = []
        if self.deferral is not None and are_few:
            host_result = self._defer(self.deferral, in_stream, *inputs)
        elif in_stream is not None:
            host_result = in_stream.submit(*inputs)
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

    def _defer(
        self,
        deferral: Deferral,
        in_stream: ExpertsInStream | None,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> Result:
        """Start the host's experts that are not deferred.

        The function that is returned waits for them, adds what the layer before left, and starts the deferred experts.
        """

        def start(ids: torch.Tensor, *, deferred: bool) -> Result:
            if in_stream is not None:
                return in_stream.submit(hidden_states, ids, topk_weights, deferred=deferred)
            host_inputs = self._on_host(hidden_states, ids, topk_weights)
            return self.host_experts.submit(*host_inputs, expert_map=self.host_map)

        now, later = deferral.split(self.layer, topk_ids, topk_weights)
        started = start(now, deferred=False)

        def wait() -> torch.Tensor:
            total = started().to(self.device)
            left = deferral.take(self.layer)
            if left is not None:
                total = total + left().to(self.device)
            if self.layer != deferral.last_layer:
                deferral.leave(self.layer, start(later, deferred=True))
            return total

        return wait

    def _on_host(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """Copy the inputs to the host, wait for the copies, and count the experts that they use."""
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ExpertsError(
                f"hybrid experts with {self.host_experts.name} on the CPU wait on it, which a CUDA graph cannot hold: turn "
                f"CUDA graphs off."
            )
        host_inputs = [tensor.to("cpu", non_blocking=True) for tensor in (hidden_states, topk_ids, topk_weights)]
        if hidden_states.is_cuda:
            torch.cuda.current_stream(hidden_states.device).synchronize()
        ids = host_inputs[1]
        used = ids[(ids >= 0) & (ids < len(self.counts))]
        self.counts += torch.bincount(used, minlength=len(self.counts))
        return host_inputs

    def _submit_and_stream(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[Result, list[int]]:
        """Start the host's part once the routing is on the host.

        Returns a function that waits for that part, and the experts that are left to be streamed to the device.
        """
        host_inputs = self._on_host(hidden_states, topk_ids, topk_weights)
        streamed_experts = self._streamed(host_inputs[1])
        host_map = self.host_map
        if streamed_experts:
            host_map = torch.where(torch.isin(host_map, torch.tensor(streamed_experts)), -1, host_map)
        return self.host_experts.submit(*host_inputs, expert_map=host_map), streamed_experts

    def _streamed(self, topk_ids: torch.Tensor) -> list[int]:
        """Return the indices of those of the host's experts that are streamed for this batch."""
        if self.streaming is None or self.stream is None:
            return []
        local = local_ids(topk_ids, self.host_map, self.num_host_experts).flatten()
        counts = torch.bincount(local + 1, minlength=self.num_host_experts + 1)[1:]
        return self.streaming.choose(counts.tolist(), len(topk_ids))


def _row(experts: ExpertsBackend, place: int) -> dict[str, torch.Tensor]:
    return {name: tensor[place : place + 1] for name, tensor in experts.tensors().items()}


def _fill(experts: ExpertsBackend, place: int, weights: ExpertWeights) -> None:
    for name, tensor in type(experts).load(weights).tensors().items():
        experts.tensors()[name][place : place + 1].copy_(tensor)
