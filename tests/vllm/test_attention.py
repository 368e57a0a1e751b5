"""Tests of our prefill for MLA on a CPU against vLLM's own, which holds all scores at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from k26_plugins.vllm import compat

pytest.importorskip(
    "vllm.v1.attention.backends.mla.prefill.cpu_sdpa", reason="vLLM's MLA prefill on a CPU came after 0.19.1"
)

from k26_plugins.vllm import attention

HEADS, SIZE, VALUE_SIZE = 4, 192, 128
SCALE = SIZE**-0.5


def backends() -> tuple[Any, Any]:
    found = []
    for kind in (attention.K26CPUPrefillBackend, compat.cpu_prefill_backend()):
        backend = kind.__new__(kind)
        backend.scale = SCALE
        found.append(backend)
    return found[0], found[1]


def inputs(queries: list[int], lengths: list[int]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    sizes = ((sum(queries), SIZE), (sum(lengths), SIZE), (sum(lengths), VALUE_SIZE))
    tensors = [torch.randn(count, HEADS, size).bfloat16() for count, size in sizes]
    offsets = [torch.tensor([0, *counts]).cumsum(0).to(torch.int32) for counts in (queries, lengths)]
    return (*tensors, *offsets)


@pytest.mark.parametrize("scores", [1, 700, 2**24], ids=str)
@pytest.mark.parametrize("lengths", [[1], [300], [5, 1, 130, 64]], ids=str)
def test_new_tokens_are_vllms_own(lengths: list[int], scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on the blocks, which hold one query of one head, an uneven part of the batch, or as
    many scores as by default."""
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v, starts, _ = inputs(lengths, lengths)
    outputs = []
    for backend in backends():
        backend._prefill_metadata = SimpleNamespace(query_start_loc=starts)
        outputs.append(backend.run_prefill_new_tokens(q, k, v, return_softmax_lse=True))
    for found, wanted in zip(*outputs, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scores", [1, 700, 2**24], ids=str)
def test_a_cached_context_is_vllms_own(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v, starts, key_starts = inputs([3, 40, 1], [130, 64, 5])
    chunk: Any = SimpleNamespace(query_start_loc=starts, cu_seq_lens=key_starts)
    for found, wanted in zip(*(one.run_prefill_context_chunk(chunk, q, k, v) for one in backends()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_a_request_without_a_cached_context() -> None:
    """A request without cached context has no key in the chunk; vLLM gives −inf as the request's lse there."""
    q, k, v, starts, key_starts = inputs([3, 40], [0, 64])
    chunk: Any = SimpleNamespace(query_start_loc=starts, cu_seq_lens=key_starts)
    for found, wanted in zip(*(one.run_prefill_context_chunk(chunk, q, k, v) for one in backends()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2, equal_nan=True)


def largest_allocation(backend: Any, length: int) -> int:
    """Return the bytes of the largest allocation while a prompt of `length` tokens is prefilled."""
    q, k, v, starts, _ = inputs([length], [length])
    backend._prefill_metadata = SimpleNamespace(query_start_loc=starts)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        backend.run_prefill_new_tokens(q, k, v, return_softmax_lse=False)
    return max(event.cpu_memory_usage for event in profiled.events())


def test_memory_does_not_grow_with_the_square_of_a_prompt() -> None:
    """Our prompt of 10,000 tokens is as long as an agent's first message: an instruction and the declarations of its
    tools."""
    ours, theirs = backends()
    assert largest_allocation(theirs, 3000) >= 4 * HEADS * 3000**2
    assert largest_allocation(ours, 10_000) <= 5 * attention.SCORES


def test_it_takes_the_place_of_vllms_own() -> None:
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum

    try:
        compat.use_cpu_prefill_backend("k26_plugins.vllm.attention.K26CPUPrefillBackend")
        assert MLAPrefillBackendEnum.CPU.get_class() is attention.K26CPUPrefillBackend
    finally:
        MLAPrefillBackendEnum.CPU.clear_override()
