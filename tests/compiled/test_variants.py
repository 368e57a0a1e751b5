"""Tests that Triton's own cache of compiled kernels, in a server's process, is complete before the first request."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from k26_kernels import KernelExperts, Shape, compile_variants, fused_experts
from k26_kernels.experts import EXACT_PAIRS, TOKENS_AT_ONCE
from k26_kernels.target import TARGETS, Device
from support.experts import make_weights
from triton.backends.compiler import GPUTarget

HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS, TOP_K = 1024, 128, 8, 8


class NoGpu:
    """A stand-in for a GPU's driver, which answers what Triton asks until a kernel is compiled."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """Yield the set of (kernel's name, cache key) that launches add to. Kernels are compiled for sm_90 and not run."""
    device = Device(TARGETS["sm_90"], "without a GPU", 132)
    for module in ("experts", "variants"):
        monkeypatch.setattr(sys.modules[f"k26_kernels.{module}"], "device_of", lambda _: device)
    kernel_class, keys = triton.JITFunction, set[tuple[str, str]]()
    original = kernel_class.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        original(kernel, *args, grid=grid, warmup=True, **kwargs)
        keys.update((kernel.fn.__name__, str(key)) for key in kernel.device_caches[0][0])

    monkeypatch.setattr(kernel_class, "run", compile_only)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(NoGpu())
    yield keys
    triton.runtime.driver._active = before


@pytest.mark.parametrize("with_map", [False, True], ids=["local ids", "a map"])
def test_no_batch_adds_to_the_cache(cached: set[tuple[str, str]], with_map: bool) -> None:
    """No batch, from one token to more tokens than the kernels compute at a time, adds a kernel to Triton's cache."""
    num_global = 3 * EXPERTS if with_map else None
    shape = Shape(HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS)
    compile_variants(torch.device("cpu"), shape, TOP_K, torch.bfloat16, num_global_experts=num_global)
    compiled = set(cached)
    assert len(compiled) > len({name for name, _ in compiled}) >= 5
    experts = KernelExperts.from_checkpoint(*make_weights(EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE).parts())
    expert_map = torch.full((num_global,), -1, dtype=torch.int32) if num_global else None
    for num_tokens in (*range(1, EXACT_PAIRS // TOP_K + 20), TOKENS_AT_ONCE, TOKENS_AT_ONCE + 3):
        x = torch.zeros(num_tokens, HIDDEN_SIZE, dtype=torch.bfloat16)
        ids = torch.zeros(num_tokens, TOP_K, dtype=torch.int32)
        fused_experts(x, experts, ids, ids.float(), expert_map=expert_map)
    assert cached == compiled
