"""Tests of the table of blocks that `moe_align_block_size` builds on the device, against its PyTorch reference."""

from __future__ import annotations

import pytest
import torch
from k26_kernels.align import (
    PAIRS_AT_ONCE,
    counts_bytes,
    max_blocks,
    moe_align_block_size,
    moe_align_block_size_reference,
)
from support.experts import route


def table(
    ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, block: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return the sorted pairs and the table's rows that the kernel writes into buffers full of garbage."""
    sorted_pairs = torch.full((ids.numel(),), -7, dtype=torch.int32, device=ids.device)
    most = max_blocks(ids.numel(), num_experts, block)
    blocks = torch.full((1 + 5 * most,), -7, dtype=torch.int32, device=ids.device)
    counts = torch.full((counts_bytes(ids.numel(), num_experts) // 4,), -7, dtype=torch.int32, device=ids.device)
    moe_align_block_size(ids, expert_map, num_experts, block, sorted_pairs, blocks, counts)
    number = int(blocks[0])
    rows = [tuple(row) for row in blocks[1:].view(most, 5)[:number].tolist()]
    return sorted_pairs[sorted_pairs >= 0].tolist(), rows


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "block"),
    [(1, 8, 8, 16), (5, 2, 3, 16), (40, 3, 7, 16), (300, 8, 12, 16), (200, 6, 6, 128), (33, 1, 1, 16)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_every_pair_is_in_its_experts_block(
    device: torch.device, num_tokens: int, top_k: int, num_experts: int, block: int, dtype: torch.dtype
) -> None:
    ids = route(num_tokens, top_k, num_experts)[0].to(device, dtype)
    ids[num_tokens // 2, 0] = -1
    sorted_pairs, rows = table(ids, None, num_experts, block)
    assert (sorted_pairs, rows) == moe_align_block_size_reference(ids, None, num_experts, block)
    assert len(sorted_pairs) == num_tokens * top_k - 1


@pytest.mark.parametrize("num_tokens", [50, 700])
def test_expert_map(device: torch.device, num_tokens: int) -> None:
    ids = route(num_tokens, 4, 16)[0].to(device)
    expert_map = torch.full((16,), -1, dtype=torch.int32, device=device)
    expert_map[torch.tensor([3, 15, 4])] = torch.arange(3, dtype=torch.int32, device=device)
    assert table(ids, expert_map, 3, 16) == moe_align_block_size_reference(ids, expert_map, 3, 16)


@pytest.mark.parametrize("num_tokens", [600, PAIRS_AT_ONCE + 1])
def test_all_tokens_on_one_expert(device: torch.device, num_tokens: int) -> None:
    """If all tokens choose one expert, that expert has more blocks than the kernel writes at a time."""
    ids = torch.full((num_tokens, 1), 2, dtype=torch.int32, device=device)
    assert table(ids, None, 4, 16) == moe_align_block_size_reference(ids, None, 4, 16)


@pytest.mark.parametrize("num_tokens", [3, PAIRS_AT_ONCE])
@pytest.mark.parametrize("nobody", [-1, 9])
def test_nobody_is_here(device: torch.device, nobody: int, num_tokens: int) -> None:
    """An id that no expert has, such as −1 or 9, counts as none, because padded rows of a batch may hold anything."""
    ids = torch.full((num_tokens, 2), nobody, dtype=torch.int32, device=device)
    assert table(ids, None, 4, 16) == ([], [])


def test_room_for_the_worst_choice() -> None:
    """In the worst case as many experts as possible have one pair more than full blocks hold."""
    assert max_blocks(1, 384, 16) == 1
    assert max_blocks(17, 1, 16) == 2
    assert max_blocks(34, 2, 16) >= 4
    assert max_blocks(8192 * 8, 384, 16) == 4096 + 384
