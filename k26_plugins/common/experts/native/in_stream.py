"""Run the native experts as work in a device's stream: two calls of the library between copies.

A CUDA graph can hold this work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from k26_plugins.common.experts.base import as_int32
from k26_plugins.common.experts.native.backend import NativeExperts
from k26_plugins.common.experts.native.threads import Call, process_threads
from k26_plugins.common.host.device_runtime import DeviceRuntime

# Seconds that a layer's work may take on the host before it counts as hung. 4096 tokens on a slow CPU take ten.
PATIENCE = 60.0


class Buffers:
    """Pinned memory for the batches of one stream. The layers share it, since their batches follow one another."""

    def __init__(self, runtime: DeviceRuntime, tokens: int, hidden_size: int, top_k: int) -> None:
        self.sizes = (tokens, hidden_size, top_k)
        self.x = runtime.pinned(tokens * hidden_size * 2).view(torch.bfloat16)
        self.ids = runtime.pinned(tokens * top_k * 4).view(torch.int32)
        self.weights = runtime.pinned(tokens * top_k * 4).view(torch.float32)
        self.out = runtime.pinned(tokens * hidden_size * 2).view(torch.bfloat16)

    def hold(self, tokens: int, hidden_size: int, top_k: int) -> bool:
        """Return whether a batch of these sizes fits."""
        return all(have >= need for have, need in zip(self.sizes, (tokens, hidden_size, top_k), strict=True))


# Buffers by runtime, stream and whether they are for deferred work. They stay until the process ends, as do the graphs
# that use them.
_buffers: dict[tuple[DeviceRuntime, int, bool], list[Buffers]] = {}


def _buffers_for(
    runtime: DeviceRuntime, stream: int, deferred: bool, tokens: int, hidden_size: int, top_k: int
) -> Buffers:
    """Return buffers of the stream that are large enough, and create them if there are none.

    Engines capture their largest batch first, so smaller batches share its buffers. Deferred work has buffers of its
    own, since it runs while the next layer's inputs are copied.
    """
    held = _buffers.setdefault((runtime, stream, deferred), [])
    for buffers in held:
        if buffers.hold(tokens, hidden_size, top_k):
            return buffers
    held.append(Buffers(runtime, tokens, hidden_size, top_k))
    return held[-1]


class ExpertsInStream:
    """The experts of one layer as work in a stream. The stream waits for them; Python and its caller do not."""

    def __init__(
        self,
        experts: NativeExperts,
        expert_map: torch.Tensor,
        counts: torch.Tensor,
        runtime: DeviceRuntime,
        device: torch.device,
    ) -> None:
        """expert_map: int32 `[num_global_experts]` on the host. counts: int64 of the same shape on the host, to which
        each use of an expert is added. runtime: that of `device`, where the batches are."""
        self.experts, self.expert_map, self.counts = experts, expert_map, counts
        self.runtime, self.device = runtime, device
        # The library's calls by the batch's sizes and buffers. The library keeps each call, since a graph may hold it.
        self._calls: dict[tuple[int, int, int], int] = {}

    @property
    def is_capturing(self) -> bool:
        """Whether the device's current stream is being captured into a graph."""
        return self.runtime.is_capturing(self.runtime.current_stream(self.device))

    def submit(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        deferred: bool = False,
    ) -> Callable[[], torch.Tensor]:
        """Put the work into the current stream, and return a function that puts the wait for it there.

        That function returns the routed sum on the device, in the dtype of `hidden_states`. Shapes and dtypes are those
        of `RoutedExperts.apply`; the tensors are on the device, and their shapes were checked. deferred: whether other
        work is submitted to the stream before this work is waited for. Raises ExpertsError if work that was put into a
        stream before did not end in time.
        """
        threads = process_threads()
        threads.check_streams()
        stream = self.runtime.current_stream(self.device)
        tokens, top_k = topk_ids.shape
        buffers = _buffers_for(self.runtime, stream, deferred, tokens, hidden_states.shape[1], top_k)
        x = hidden_states.to(torch.bfloat16).contiguous()
        for target, source in (
            (buffers.x, x),
            (buffers.ids, as_int32(topk_ids).contiguous()),
            (buffers.weights, topk_weights.to(torch.float32).contiguous()),
        ):
            self.runtime.copy(stream, target, source, to_host=True)
        call = self._call(buffers, tokens, top_k)
        self.runtime.launch(stream, threads.native.k26_stream_submit, call)

        def wait() -> torch.Tensor:
            self.runtime.launch(stream, threads.native.k26_stream_wait, call)
            result = torch.empty_like(x)
            self.runtime.copy(stream, result, buffers.out[: result.numel()], to_host=False)
            return result.to(hidden_states.dtype)

        return wait

    def _call(self, buffers: Buffers, tokens: int, top_k: int) -> int:
        key = (tokens, top_k, id(buffers))
        if key not in self._calls:
            call = Call(
                buffers.x.data_ptr(),
                buffers.ids.data_ptr(),
                buffers.weights.data_ptr(),
                self.expert_map.data_ptr(),
                self.expert_map.numel(),
                tokens,
                top_k,
                buffers.out.data_ptr(),
                0,
                self.counts.data_ptr(),
            )
            self._calls[key] = process_threads().stream_call(self.experts.layer, call, PATIENCE)
        return self._calls[key]
