"""The native experts as work in a device's stream: two calls of the library between copies, which a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable

import torch

from k26_plugins.common.experts.base import as_int32
from k26_plugins.common.experts.native.backend import NativeExperts
from k26_plugins.common.experts.native.threads import Call, process_threads
from k26_plugins.common.host.device_runtime import DeviceRuntime

# What a layer's work may take on the host before it counts as hung, in seconds. 4096 tokens on a slow CPU take ten.
PATIENCE = 60.0


class Buffers:
    """Pinned memory for the batches of one stream, which follow one another, of whatever layer."""

    def __init__(self, runtime: DeviceRuntime, tokens: int, hidden_size: int, top_k: int) -> None:
        self.sizes = (tokens, hidden_size, top_k)
        self.x = runtime.pinned(tokens * hidden_size * 2).view(torch.bfloat16)
        self.ids = runtime.pinned(tokens * top_k * 4).view(torch.int32)
        self.weights = runtime.pinned(tokens * top_k * 4).view(torch.float32)
        self.out = runtime.pinned(tokens * hidden_size * 2).view(torch.bfloat16)

    def hold(self, tokens: int, hidden_size: int, top_k: int) -> bool:
        """Whether a batch of these sizes fits."""
        return all(have >= need for have, need in zip(self.sizes, (tokens, hidden_size, top_k), strict=True))


# By runtime, stream and whether they are for deferred work. They stay until the process ends, as the graphs do that use
# them.
_buffers: dict[tuple[DeviceRuntime, int, bool], list[Buffers]] = {}


def _buffers_for(
    runtime: DeviceRuntime, stream: int, deferred: bool, tokens: int, hidden_size: int, top_k: int
) -> Buffers:
    """Those of the stream that are large enough: engines capture their largest batch first, and smaller ones share its.

    Deferred work has its own, since it runs while the next layer's inputs are copied.
    """
    held = _buffers.setdefault((runtime, stream, deferred), [])
    for buffers in held:
        if buffers.hold(tokens, hidden_size, top_k):
            return buffers
    held.append(Buffers(runtime, tokens, hidden_size, top_k))
    return held[-1]


class ExpertsInStream:
    """The experts of one layer. A stream waits for them; Python and its caller do not."""

    def __init__(
        self,
        experts: NativeExperts,
        expert_map: torch.Tensor,
        counts: torch.Tensor,
        runtime: DeviceRuntime,
        device: torch.device,
    ) -> None:
        """expert_map: int32 `[num_global_experts]` on the host. counts: int64 of the same shape there, to which each use of
        an expert is added. device: where the batches are, of this runtime."""
        self.experts, self.expert_map, self.counts = experts, expert_map, counts
        self.runtime, self.device = runtime, device
        # By the batch's sizes and its buffers: the library keeps what a graph may hold.
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
        """Put the work into the current stream. Shapes are those of `RoutedExperts.apply`, on the device, and checked.

        deferred: other work is submitted to the stream before this is waited for. The function that is returned puts the
        wait for it there, and returns the routed sum, on the device. Raises ExpertsError where work that was put into a
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
