"""Tests of our attention on the plain torch backend against SGLang's own, on the same paged cache."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from k26_plugins.sglang import compat, register

# SGLang reads this variable when it is imported, which nothing above does.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
register()

HEADS, LATENT, ROPE = 4, 512, 64
SCALE = 192**-0.5


def backends() -> tuple[Any, Any]:
    from k26_plugins.sglang import attention

    ours, theirs = attention.K26TorchNativeAttnBackend, compat.torch_native_backend()
    return ours.__new__(ours), theirs.__new__(theirs)


def paged(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a latent cache [slots, 1, 576], a table with the cache's slots of one request in each row (in random
    order), and the table's row of each request."""
    torch.manual_seed(0)
    cache = torch.randn(sum(lengths), 1, LATENT + ROPE).bfloat16()
    slots = torch.zeros(len(lengths) + 2, max(lengths), dtype=torch.int32)
    rows = torch.randperm(len(lengths) + 2)[: len(lengths)]
    order = torch.randperm(len(cache)).to(torch.int32).split(lengths)
    for row, own in zip(rows.tolist(), order, strict=True):
        slots[row, : len(own)] = own
    return cache, slots, rows


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("lengths", [[1], [7], [300], [5, 1, 130, 64], [33, 2]], ids=str)
@pytest.mark.parametrize("new", ["all", "one", "half"])
def test_an_extension_is_sglangs_own(lengths: list[int], new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from k26_plugins.sglang import attention

    # The blocks have a few tokens each, so that the last block is not full.
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 7 * HEADS * max(lengths))
    ours, theirs = backends()
    cache, slots, rows = paged(lengths)
    seq_lens = torch.tensor(lengths)
    extended = {"all": seq_lens, "one": torch.ones_like(seq_lens), "half": (seq_lens + 1) // 2}[new]
    query = torch.randn(int(extended.sum()), HEADS, LATENT + ROPE).bfloat16()
    values = cache[..., :LATENT]
    results = []
    for backend in (ours, theirs):
        output = query.new_empty(len(query), HEADS, LATENT)
        backend._run_sdpa_forward_extend(
            query, output, cache, values, slots, rows, seq_lens, seq_lens - extended, extended,
            scaling=SCALE, enable_gqa=True, causal=True,
        )  # fmt: skip
        results.append(output)
    assert torch.isfinite(results[0]).all()
    assert error(*results) < 4e-3


def test_a_decode_is_sglangs_own() -> None:
    ours, theirs = backends()
    lengths = [1, 90, 300]
    cache, slots, rows = paged(lengths)
    query = torch.randn(len(lengths), HEADS, LATENT + ROPE).bfloat16()
    results = []
    for backend in (ours, theirs):
        output = query.new_empty(len(query), HEADS, LATENT)
        backend._run_sdpa_forward_decode(
            query, output, cache, cache[..., :LATENT], slots, rows, torch.tensor(lengths),
            scaling=SCALE, enable_gqa=True, causal=False,
        )  # fmt: skip
        results.append(output)
    assert error(*results) < 4e-3


def largest_allocation(backend: Any, length: int) -> int:
    """Return the bytes of the largest allocation while the last 64 of a prompt's `length` tokens are computed."""
    cache, slots, rows = paged([length])
    query = torch.randn(64, HEADS, LATENT + ROPE).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        backend._run_sdpa_forward_extend(
            query, query.new_empty(64, HEADS, LATENT), cache, cache[..., :LATENT], slots, rows,
            torch.tensor([length]), torch.tensor([length - 64]), torch.tensor([64]),
            scaling=SCALE, enable_gqa=True, causal=True,
        )  # fmt: skip
    return max(event.cpu_memory_usage for event in profiled.events())


def test_memory_does_not_grow_with_the_square_of_a_prompt() -> None:
    ours, theirs = backends()
    scores = 4 * HEADS * 3000**2
    assert largest_allocation(theirs, 3000) >= scores
    assert largest_allocation(ours, 3000) < scores / 20
