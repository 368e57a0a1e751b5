"""Pretends that the host is a device: its memory is torch's CPU tensors, its runtime is `native/device_runtime.cpp`.

Within `PretendedDevice.kernels()` each of torch's operators is a kernel, which is put into the device's stream; while
the stream is captured, the kernel becomes a part of the graph. The tests thereby run the same Python code that an
engine runs with a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.experts import inputs, make_weights, route
from support.native_sample import COMPILER, SOURCES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k26_plugins.common.experts import create_experts
from k26_plugins.common.experts.base import ExpertsBackend, ExpertWeights, RoutedBatch, Sizes
from k26_plugins.common.experts.native import NativeExperts
from k26_plugins.common.experts.native.threads import Call, Threads
from k26_plugins.common.host.device_runtime import DeviceRuntime

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
GLOBAL = 0  # cudaStreamCaptureModeGlobal, which torch uses by default


def compile_runtime(folder: Path) -> ctypes.CDLL:
    """Compile `native/device_runtime.cpp` into `folder` and load it."""
    assert COMPILER is not None
    made = folder / "libcudart.so"
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", str(SOURCES / "device_runtime.cpp")]
    subprocess.run([*command, "-o", str(made), "-ldl"], check=True)
    return ctypes.CDLL(str(made))


class Graph:
    """A captured graph; `kept` holds the kernels and tensors that its replays use."""

    def __init__(self, device: PretendedDevice) -> None:
        self.device = device
        self.handle = ctypes.c_void_p()
        self.kept: list[Any] = []

    def replay(self) -> None:
        """Launch the graph into the device's stream, without waiting for it."""
        self.device.call("cudaGraphLaunch", self.handle, self.device.stream)


class PretendedDevice:
    """A device with one stream. `graph` is the graph that is being captured, or None.

    library: what `compile_runtime` returned. prefix: that of the runtime's functions, `cuda` or `hip`.
    """

    def __init__(self, library: ctypes.CDLL, prefix: str = "cuda") -> None:
        self.library = library
        library.standinViolation.restype = ctypes.c_char_p
        self.stream = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(self.stream))
        assert self.stream.value is not None
        handle = self.stream.value
        self.runtime = DeviceRuntime(library, prefix, lambda device: handle)
        self.graph: Graph | None = None

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the runtime. Raises AssertionError with the rule of CUDA that was broken, if one was."""
        error = getattr(self.library, name)(*arguments)
        assert error == 0, (name, self.library.standinViolation().decode())

    def synchronize(self) -> None:
        """Wait for the stream. Raises AssertionError if something was done that CUDA forbids."""
        self.call("cudaStreamSynchronize", self.stream)

    def launch(self, function: Callable[[], object], *uses: Any) -> None:
        """Put a kernel into the stream; outside a capture, wait for it."""

        @KERNEL
        def kernel(_: int | None) -> None:
            # Torch, too, calls the operators that a dispatch mode intercepts below autograd.
            with torch._C._AutoDispatchBelowAutograd():
                function()

        if self.graph is not None:
            self.graph.kept.append((kernel, uses))
        self.call("standinKernel", kernel, None, self.stream)
        if self.graph is None:
            self.synchronize()

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Run torch's operators as kernels of the stream until the block ends."""
        with _Kernels(self):
            yield
            if self.graph is None:
                self.synchronize()

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Capture what the block puts into the stream, and yield the graph, which can be replayed after the block."""
        graph, captured = Graph(self), ctypes.c_void_p()
        self.call("cudaStreamBeginCapture", self.stream, GLOBAL)
        self.graph = graph
        try:
            with self.kernels():
                yield graph
        finally:
            self.graph = None
            self.call("cudaStreamEndCapture", self.stream, ctypes.byref(captured))
        self.call("cudaGraphInstantiate", ctypes.byref(graph.handle), captured, ctypes.c_ulonglong(0))


class _Kernels(TorchDispatchMode):
    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device
        self.in_use: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.device.graph is None:
            # Outside a capture the host waits for the kernel. The result is kept for later work in the stream, as a
            # device's allocator keeps it.
            self.device.synchronize()
            result = func(*args, **kwargs)
            self.in_use.append(result)
            return result
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read while a graph is captured"
        # This call gives the results' shapes, and the memory into which each replay writes what it computes.
        result = func(*args, **kwargs)

        def again() -> None:
            for target, source in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(target, torch.Tensor) and target.data_ptr() != source.data_ptr():
                    target.copy_(source)

        self.device.launch(again, args, kwargs, result)
        return result


class OnDevice(ExpertsBackend):
    """A backend of experts on the device, whose kernel lets a backend on the host compute."""

    name = "on-device"

    def __init__(self, device: PretendedDevice, experts: ExpertsBackend) -> None:
        super().__init__(experts.sizes)
        self.device, self.experts = device, experts

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        raise NotImplementedError

    @classmethod
    def load(cls, weights: ExpertWeights) -> ExpertsBackend:  # type: ignore[override]
        return create_experts(weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.experts.tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> OnDevice:
        raise NotImplementedError

    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        return self.experts.restore(tensors)

    def _forward(self, batch: RoutedBatch) -> None:
        inputs = (batch.hidden_states, batch.topk_ids, batch.topk_weights)
        apply = self.experts.apply
        self.device.launch(lambda: apply(*inputs, expert_map=batch.expert_map, out=batch.out), *inputs, batch.out)


def be_late(device: PretendedDevice, threads: Threads) -> None:
    """Put work into the device's stream that takes longer than its patience of 1 ms, because it waits for a long batch.

    The call returns when both are done.
    """
    hidden, inner, tokens = 128, 64, 2**18
    experts = create_experts(make_weights(2, hidden, inner), "native")
    assert isinstance(experts, NativeExperts)
    x, (ids, weights) = inputs(tokens, hidden), route(tokens, 1, 2)
    out = torch.empty_like(x)
    call = Call(x.data_ptr(), ids.data_ptr(), weights.data_ptr(), None, 0, 1, 1, out.data_ptr(), 0)
    late = threads.stream_call(experts.layer, call, patience=1e-3)
    in_its_way = experts.submit(x, ids, weights)
    device.runtime.launch(device.runtime.current_stream(x.device), threads.native.k26_stream_submit, late)
    device.synchronize()
    in_its_way()
