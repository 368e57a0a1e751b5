"""Tests that all kernel variants that batches of any size launch are compiled before the first request."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from k26_kernels import KernelExperts, Shape, batched_experts, compile_batched, compile_variants, fused_experts
from k26_kernels.experts import EXACT_PAIRS, TOKENS_AT_ONCE, make_plan
from k26_kernels.moe_gemm import moe_gemm_kernel
from k26_kernels.target import TARGETS, Device
from k26_kernels.variants import batch_sizes
from support.experts import error, inputs, judge, make_weights, route, to_device

from k26_plugins.common.experts import Batches, ExpertsError, create_experts, triton
from k26_plugins.common.experts.triton import TritonExperts

LAUNCHER = type(moe_gemm_kernel)
"""Triton's own class of kernels; without a GPU it is the interpreter's class."""


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch, *, run: bool) -> Iterator[set[Any]]:
    """Yield a set that collects, for each launch, what decides which code it runs: its kernel, its compile-time
    arguments, the dtypes of its tensors and whether they are aligned. With `run=False` no kernel is run."""
    seen: set[Any] = set()
    original = LAUNCHER.run

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tensors = [(arg.dtype, arg.data_ptr() % 16 == 0) for arg in args if isinstance(arg, torch.Tensor)]
        seen.add((kernel.fn.__name__, *tensors, *sorted(kwargs.items())))
        return original(kernel, *args, grid=grid, warmup=warmup, **kwargs) if run else None

    with monkeypatch.context() as patch:
        patch.setattr(LAUNCHER, "run", launch)
        yield seen


HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS, TOP_K = 1024, 128, 16, 4
ALL_SIZES = range(1, EXACT_PAIRS // TOP_K + 20)


@pytest.mark.parametrize("with_map", [False, True], ids=["local ids", "a map"])
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "batch-invariant"])
def test_no_batch_launches_what_was_not_compiled(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, with_map: bool, batch_invariant: bool
) -> None:
    """Batches of any size, including those that are computed in two parts, launch exactly the variants that were
    compiled, so that none is compiled in vain."""
    if device.type == "cpu":
        # A real GPU has so many SMs that the GEMMs of few tokens are cut along K.
        large = Device(TARGETS["sm_90"], "interpreter", 132)
        for module in ("experts", "variants"):
            monkeypatch.setattr(sys.modules[f"k26_kernels.{module}"], "device_of", lambda device: large)
    shape, num_global = Shape(HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS), 3 * EXPERTS if with_map else None
    with launches(monkeypatch, run=False) as compiled:
        compile_variants(
            device, shape, TOP_K, torch.float16, num_global_experts=num_global, batch_invariant=batch_invariant
        )
    weights = to_device(make_weights(EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE), device)
    experts = KernelExperts.from_checkpoint(*weights.parts())
    expert_map = torch.arange(num_global, dtype=torch.int32, device=device) - EXPERTS if num_global else None
    with launches(monkeypatch, run=False) as launched:
        for num_tokens in (*ALL_SIZES, TOKENS_AT_ONCE, TOKENS_AT_ONCE + 3):
            x = torch.zeros(num_tokens, HIDDEN_SIZE, dtype=torch.bfloat16, device=device)
            ids = torch.zeros(num_tokens, TOP_K, dtype=torch.int32, device=device)
            options = {"expert_map": expert_map, "out": x.half(), "batch_invariant": batch_invariant}
            fused_experts(x, experts, ids, ids.float(), **options)  # type: ignore[arg-type]
    assert launched == compiled
    assert {name for name, *_ in launched} >= {"align_kernel", "count_kernel", "moe_gemm_kernel", "reduce_kernel"}
    assert batch_invariant or "silu_and_mul_kernel" in {name for name, *_ in launched}


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "batch-invariant"])
def test_no_buffers_launch_what_was_not_compiled(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, batch_invariant: bool
) -> None:
    """Buffers of any length, with any expected number of tokens, launch exactly the variants that were compiled."""
    shape = Shape(128, 128, 4)
    with launches(monkeypatch, run=False) as compiled:
        number = compile_batched(device, shape, torch.bfloat16, batch_invariant=batch_invariant)
    experts = KernelExperts.from_checkpoint(*to_device(make_weights(4, 128, 128), device).parts())
    counts = torch.zeros(4, dtype=torch.int32, device=device)
    with launches(monkeypatch, run=False) as launched:
        for max_tokens in (1, 7, 128, 1024):
            x = torch.zeros(4, max_tokens, 128, dtype=torch.bfloat16, device=device)
            for expected in (0.0, 0.4, 3.0, 17.5, 40.0, 90.0, 1e6):
                batched_experts(x, experts, counts, x, expected=expected, batch_invariant=batch_invariant)
    assert launched == compiled
    # There is one variant of the table's kernel for each block size.
    assert number == len([name for name, *_ in launched if name == "table_kernel"]) == (1 if batch_invariant else 4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [Shape(7168, 2048, 384), Shape(7168, 256, 384), Shape(7168, 2048, 48)], ids=str)
def test_they_are_few_and_small(target: str, shape: Shape) -> None:
    """At the real sizes the batches that reach every config are few and need little memory, because a server's start
    compiles each variant and needs the workspace of the largest batch."""
    device = Device(TARGETS[target], "a GPU without a file", 132)
    sizes = batch_sizes(device, shape, 8, 384)
    assert len(sizes) == len(set(sizes)) <= 12
    assert {make_plan(device, shape, size, 8, 384).config for size in sizes} == {
        make_plan(device, shape, size, 8, 384).config for size in range(1, TOKENS_AT_ONCE + 1, 7)
    }
    assert max(make_plan(device, shape, size, 8, 384).bytes for size in sizes) < 2**30


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[Callable[..., Batches]]:
    """Let the backend run where the interpreter does, as in a process that has compiled nothing, and yield a function
    that makes `Batches`."""
    if device.type == "cpu":
        monkeypatch.setattr("k26_plugins.common.experts.triton.unusable_on", lambda device: None)
        monkeypatch.setattr(TritonExperts, "device_type", "cpu")
    monkeypatch.setattr(TritonExperts, "self_test_tokens", (1, 5))
    triton._make_ready.cache_clear()
    yield lambda dtype=torch.bfloat16: Batches(6, 6, dtype, logging.getLogger("engine"))
    triton._make_ready.cache_clear()


def test_a_server_s_layers_are_compiled_for_once(
    ready: Callable[..., Batches],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The variants are compiled when the first layer is created, and the log says so; ids and expert maps of any dtype
    then launch no other variant."""
    caplog.set_level(logging.INFO, "engine")
    weights = make_weights(4, 128, 128)
    with launches(monkeypatch, run=True) as compiled:
        layers = [create_experts(to_device(weights, device), "triton", batches=ready()) for _ in range(2)]
    assert caplog.text.count("the Triton kernels are compiled for batches of every size, ") == 1
    assert "7 variants of 4 experts in " in caplog.text
    ids, topk_weights = route(9, 6, 6)
    ids = ids.long()
    ids[0, 0] = 2**32 + 1  # no expert has this id, but a padded row may hold anything
    x = inputs(9, 128)
    expert_map = torch.tensor([-1, 0, 1, 2, 3, -1])
    with launches(monkeypatch, run=True) as launched:
        result = layers[1].apply(
            x.to(device), ids.to(device), topk_weights.to(device), expert_map=expert_map.to(device)
        )
    assert launched <= compiled
    here = expert_map[ids.clamp(max=5)]
    assert error(result.cpu(), judge(weights, x, here, topk_weights)) <= 5e-3
    with launches(monkeypatch, run=False):
        TritonExperts.make_ready(weights, ready(torch.float32))
    assert caplog.text.count("the Triton kernels are compiled") == 2


def test_kernels_that_do_not_compile_never_serve(
    ready: Callable[..., Batches], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend is refused if a kernel config fails to compile, even one that the self-test does not reach."""
    original = LAUNCHER.run

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("BLOCK_SIZE_M") == 128:
            raise RuntimeError("out of resource: shared memory")
        return original(kernel, *args, **kwargs)

    monkeypatch.setattr(LAUNCHER, "run", run)
    said = rf"triton is not, because its kernels cannot be compiled for {device.type}.*: RuntimeError: out of resource"
    with pytest.raises(ExpertsError, match=said):
        create_experts(to_device(make_weights(4, 128, 128), device), "triton", batches=ready())
