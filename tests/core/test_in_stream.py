"""Tests of hybrid experts in a device's stream and in its graphs. The code is the one that runs with a GPU; the device
is pretended. The judges are layers that wait for the device, and the float64 product of support/experts.py.

The library's side is tested under sanitizers in tests/native/test_stream.py.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import error, inputs, judge, make_weights, route
from support.native_sample import needs_compiler, needs_set
from support.pretended_device import OnDevice, PretendedDevice, be_late, compile_runtime

from k26_plugins.common.experts import ExpertsError, ExpertWeights, create_experts
from k26_plugins.common.experts.deferred import Deferral
from k26_plugins.common.experts.hybrid import FEW_TOKENS, HybridExperts
from k26_plugins.common.experts.native.threads import Threads, process_threads
from k26_plugins.common.experts.op import held_experts, number_of
from k26_plugins.common.experts.placement import LayerPlacement, place
from k26_plugins.common.experts.streaming import Streaming
from k26_plugins.common.host import device_runtime
from k26_plugins.common.host.device_runtime import DeviceRuntimeError

pytestmark = [needs_compiler, needs_set]

EXPERTS, HIDDEN, INNER, TOP_K = 8, 128, 64, 3
TOLERANCE = 6e-3
HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_runtime(tmp_path_factory.mktemp("runtime"))


@pytest.fixture
def device(library: ctypes.CDLL) -> PretendedDevice:
    return PretendedDevice(library)


@pytest.fixture(scope="module")
def weights() -> ExpertWeights:
    return make_weights(EXPERTS, HIDDEN, INNER)


def placed(on_device: int) -> LayerPlacement:
    return place(EXPERTS, on_device, counts=[3, 1, 4, 1, 5, 9, 2, 6])


def layer(
    device: PretendedDevice, weights: ExpertWeights, on_device: int, host: str = "native", **more: Any
) -> HybridExperts:
    placement = placed(on_device)
    there = create_experts(weights.copy_of(list(placement.device_ids))) if on_device else None
    return HybridExperts(
        OnDevice(device, there) if there is not None else None,
        create_experts(weights.copy_of(list(placement.host_ids)), host),
        placement,
        HOST,
        runtime=device.runtime,
        **more,
    )


class Batch:
    """The buffers that an engine keeps for one batch size, and the step over two layers that it captures."""

    def __init__(self, tokens: int) -> None:
        self.x = inputs(tokens, HIDDEN)
        self.ids, self.weights = route(tokens, TOP_K, EXPERTS)
        self.middle, self.out = torch.empty_like(self.x), torch.empty_like(self.x)

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        # −1 stands for no expert, as in padding.
        self.ids.copy_(torch.rand(len(self.x), EXPERTS + 1, generator=generator).topk(TOP_K).indices - 1)
        self.weights.copy_(torch.rand(self.weights.shape, generator=generator))

    def step(self, layers: list[HybridExperts]) -> None:
        held_in_turn = zip(layers, (self.x, self.middle), (self.middle, self.out), strict=True)
        for experts, given, out in held_in_turn:
            experts.apply(given, self.ids, self.weights, out=out)


def replayed(
    device: PretendedDevice,
    layers: list[HybridExperts],
    waiting: list[HybridExperts],
    tokens: Sequence[int],
    count: int,
) -> Iterator[Batch]:
    """Yield batches of the given sizes in a random order, each with new data, after asserting that its graph gives the
    same bits as the layers that wait for the device."""
    batches, graphs = [Batch(size) for size in tokens], []
    for batch in batches:
        with device.capture() as graph:
            batch.step(layers)
        graphs.append(graph)
    chosen = random.Random(0)
    for replay in range(count):
        number = chosen.randrange(len(batches))
        batch = batches[number]
        batch.fill(replay)
        graphs[number].replay()
        device.synchronize()
        found = batch.out.clone()
        batch.step(waiting)
        assert torch.equal(found, batch.out), replay
        yield batch


def test_a_thousand_replays_give_what_the_waiting_run_gives(device: PretendedDevice, weights: ExpertWeights) -> None:
    layers = [layer(device, weights, 5) for _ in range(2)]
    waiting = [HybridExperts(one.device_experts, one.host_experts, placed(5), HOST) for one in layers]
    for replay, batch in enumerate(replayed(device, layers, waiting, (FEW_TOKENS + 6, 3, 1), 1000)):
        if replay % 50 == 0:
            assert error(batch.middle, judge(weights, batch.x, batch.ids, batch.weights)) <= TOLERANCE


def test_replays_stay_right_when_experts_move(device: PretendedDevice, weights: ExpertWeights) -> None:
    """Replays also count how often each expert was chosen."""
    layers = [layer(device, weights, 3) for _ in range(2)]
    batch = Batch(5)
    with device.capture() as graph:
        batch.step(layers)
    for replay in range(20):
        batch.fill(replay)
        before = [one.counts.clone() for one in layers]
        graph.replay()
        device.synchronize()
        chosen = torch.bincount(batch.ids[batch.ids >= 0].long(), minlength=EXPERTS)
        assert all(torch.equal(one.counts - counts, chosen) for one, counts in zip(layers, before, strict=True))
        assert error(batch.middle, judge(weights, batch.x, batch.ids, batch.weights)) <= TOLERANCE
        for one in layers:
            one.exchange(one.placement.device_ids[replay % 3], one.placement.host_ids[replay % 5])
    assert layers[0].placement.device_ids != placed(3).device_ids


def test_replays_with_deferred_experts_give_what_the_waiting_run_gives(
    device: PretendedDevice, weights: ExpertWeights
) -> None:
    in_graphs, in_turn = Deferral(2, last_layer=2), Deferral(2, last_layer=2)
    layers = [layer(device, weights, 3, deferral=in_graphs, layer=number) for number in (1, 2)]
    waiting = [
        HybridExperts(one.device_experts, one.host_experts, placed(3), HOST, deferral=in_turn, layer=one.layer)
        for one in layers
    ]
    assert sum(1 for _ in replayed(device, layers, waiting, (FEW_TOKENS + 6, 5, 1), 300)) == 300


def test_outside_a_graph_the_same_path_serves(device: PretendedDevice, weights: ExpertWeights) -> None:
    experts = layer(device, weights, 3)
    for tokens in (1, 5, 5, FEW_TOKENS):
        batch = Batch(tokens)
        with device.kernels():
            experts.apply(batch.x, batch.ids.long(), batch.weights.double(), out=batch.out)
        assert error(batch.out, judge(weights, batch.x, batch.ids, batch.weights)) <= TOLERANCE
    assert experts.in_stream is not None
    assert len(experts.in_stream._calls) == 3


def test_to_torch_compile_it_is_one_operator(device: PretendedDevice, weights: ExpertWeights) -> None:
    experts, batch = layer(device, weights, 3), Batch(2)
    number = number_of(experts)
    operators: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        operators.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return lambda *_: ()

    def moe(out: torch.Tensor) -> None:
        held_experts(out, batch.x, batch.weights, batch.ids, None, number)

    torch.compile(moe, fullgraph=True, backend=backend)(batch.out)
    assert operators == [torch.ops.k26.held_experts.default]


def test_a_longer_batch_waits_for_its_routing_and_may_be_streamed(
    device: PretendedDevice, weights: ExpertWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = layer(device, weights, 3, streaming=Streaming("auto", 4))
    submitted: list[int] = []

    def submit(x: torch.Tensor, *_: Any) -> Callable[[], torch.Tensor]:
        submitted.append(len(x))
        return lambda: torch.zeros_like(x)

    monkeypatch.setattr(experts.in_stream, "submit", submit)
    for tokens in (3, 4):
        batch = Batch(tokens)
        experts.apply(batch.x, batch.ids, batch.weights, out=batch.out)
    assert submitted == [3]
    assert error(batch.out, judge(weights, batch.x, batch.ids, batch.weights)) <= TOLERANCE


def test_a_graph_holds_through_an_update_of_the_weights(device: PretendedDevice, weights: ExpertWeights) -> None:
    """The new weights are written where the old ones lay, as engines update them, so a graph that was captured before
    computes with the new weights."""
    experts = layer(device, weights, 0)
    batch = Batch(3)
    with device.capture() as graph:
        experts.apply(batch.x, batch.ids, batch.weights, out=batch.out)
    updated = make_weights(EXPERTS, HIDDEN, INNER, seed=1)
    for name, tensor in create_experts(updated.copy_of(list(range(EXPERTS))), "native").tensors().items():
        experts.host_experts.tensors()[name].copy_(tensor)
    experts.use(None, type(experts.host_experts).from_tensors(experts.host_experts.tensors()))
    graph.replay()
    device.synchronize()
    assert error(batch.out, judge(updated, batch.x, batch.ids, batch.weights)) <= TOLERANCE


@pytest.fixture
def fresh_threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """Return threads as in a process of its own, because a worker that hangs makes the threads unusable from then
    on."""
    monkeypatch.setattr("k26_plugins.common.experts.native.threads._process_threads", None)
    return process_threads()


def test_work_that_does_not_end_fails_the_next_step(
    device: PretendedDevice, weights: ExpertWeights, fresh_threads: Threads
) -> None:
    experts = layer(device, weights, 0)
    batch = Batch(8)
    with device.capture() as graph:
        experts.apply(batch.x, batch.ids, batch.weights, out=batch.out)
    fresh_threads.check_streams()
    be_late(device, fresh_threads)
    with pytest.raises(ExpertsError, match=r"did not end a layer's work in time.*restart the server"):
        fresh_threads.check_streams()
    with pytest.raises(ExpertsError, match="restart the server"):
        experts.apply(batch.x, batch.ids, batch.weights)
    graph.replay()
    device.synchronize()
    assert batch.out.isnan().all()


def test_experts_that_wait_are_refused_in_a_graph(
    device: PretendedDevice, weights: ExpertWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = layer(device, weights, 0, host="cpu")
    assert experts.in_stream is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    batch = Batch(1)

    # Nothing else of a tensor on a GPU is looked at before the error.
    class OnGpu(torch.Tensor):
        is_cuda = True

    with pytest.raises(ExpertsError, match=r"with cpu on the CPU wait on it, .* turn CUDA graphs off"):
        experts.apply(batch.x.as_subclass(OnGpu), batch.ids, batch.weights)


def test_the_judge_finds_a_host_function_that_calls_the_runtime(library: ctypes.CDLL, tmp_path_factory: Any) -> None:
    """The pretended runtime is compiled into a library of its own for this test, because it keeps a fault that it has
    once found."""
    device = PretendedDevice(compile_runtime(tmp_path_factory.mktemp("again")))
    # Both host functions are the library's own, of one argument, so that no Python code comes between.
    device.call("cudaLaunchHostFunc", device.stream, device.library.hipGetErrorString, None)
    device.synchronize()
    device.call("cudaLaunchHostFunc", device.stream, device.library.cudaStreamSynchronize, device.stream)
    with pytest.raises(AssertionError, match="a host function calls cudaStreamSynchronize"):
        device.synchronize()


def test_the_judge_finds_a_host_function_that_takes_python_s_lock(tmp_path_factory: Any) -> None:
    device = PretendedDevice(compile_runtime(tmp_path_factory.mktemp("again")))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    device.call("cudaLaunchHostFunc", device.stream, function, None)
    with pytest.raises(AssertionError, match="takes Python's lock"):
        device.synchronize()


def test_the_judge_finds_memory_that_is_not_pinned(tmp_path_factory: Any) -> None:
    device = PretendedDevice(compile_runtime(tmp_path_factory.mktemp("again")))
    with pytest.raises(DeviceRuntimeError, match=r"cudaMemcpyAsync fails with a copy is of memory that is not pinned"):
        device.runtime.copy(device.runtime.current_stream(HOST), torch.empty(4), torch.empty(4), to_host=True)


def test_the_names_of_amd_s_runtime(library: ctypes.CDLL, weights: ExpertWeights) -> None:
    device = PretendedDevice(library, prefix="hip")
    experts, batch = layer(device, weights, 0), Batch(2)
    with device.capture() as graph:
        experts.apply(batch.x, batch.ids, batch.weights, out=batch.out)
    graph.replay()
    device.synchronize()
    assert error(batch.out, judge(weights, batch.x, batch.ids, batch.weights)) <= TOLERANCE


def test_the_runtime_is_the_one_that_is_loaded(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(library._name) in device_runtime._loaded()
    found = device_runtime.device_runtime.__wrapped__()
    monkeypatch.setattr(device_runtime, "_loaded", lambda: [])
    assert found.pinned(16).numel() == 16
    with pytest.raises(DeviceRuntimeError, match="no runtime of CUDA or ROCm"):
        device_runtime.device_runtime.__wrapped__()
