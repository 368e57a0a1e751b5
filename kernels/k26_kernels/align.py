"""Which slots each expert has, as a table of blocks: built on the device in one launch, without the host's knowing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = tl.constexpr(5)  # of the table of blocks
SLOTS_AT_ONCE = 1024


def max_blocks(num_slots: int, num_experts: int, block_tokens: int) -> int:
    """The most blocks that any choice of experts can give: each expert leaves at most one block unfilled."""
    return min(num_slots, num_slots // block_tokens + min(num_experts, num_slots))


@triton.jit
def local_expert(
    topk_ids: tl.tensor, expert_map: tl.tensor, slot: tl.tensor,
    num_slots: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor, HAS_MAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The local expert of each slot, negative where there is none here."""
    chosen = tl.load(topk_ids + slot, mask=slot < num_slots, other=-1)
    if HAS_MAP:
        # What the map does not have would be read from anywhere.
        chosen = tl.load(expert_map + chosen, mask=(chosen >= 0) & (chosen < num_global), other=-1)
    return tl.where(chosen < num_experts, chosen, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_global"])
def align_kernel(
    topk_ids: tl.tensor, expert_map: tl.tensor, slots: tl.tensor, blocks: tl.tensor,
    num_slots: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor,
    BLOCK_TOKENS: tl.constexpr, BINS: tl.constexpr, SLOTS_AT_ONCE: tl.constexpr, HAS_MAP: tl.constexpr,
) -> None:  # fmt: skip
    """Program e writes expert e's slots in their order, and its rows of the table. The last writes the number of rows.

    Every program counts the slots of all experts itself: that costs less than a second launch to share the counts.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_slots, SLOTS_AT_ONCE):
        slot = start + tl.arange(0, SLOTS_AT_ONCE)
        local = local_expert(topk_ids, expert_map, slot, num_slots, num_experts, num_global, HAS_MAP)
        counts += tl.histogram(tl.where(local < 0, BINS - 1, local), BINS)
    counts = tl.where(bins < num_experts, counts, 0)
    num_blocks = (counts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    before = bins < expert
    begin = tl.sum(tl.where(before, counts, 0))
    first = tl.sum(tl.where(before, num_blocks, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    own_blocks = (count + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    if expert == num_experts - 1:
        tl.store(blocks, first + own_blocks)
    for start in range(0, own_blocks, 32):
        block = start + tl.arange(0, 32)
        mine = block < own_blocks
        row = blocks + 1 + (first + block) * COLUMNS
        tl.store(row, tl.zeros_like(block) + expert, mask=mine)
        tl.store(row + 1, begin + block * BLOCK_TOKENS, mask=mine)
        tl.store(row + 2, tl.minimum(count - block * BLOCK_TOKENS, BLOCK_TOKENS), mask=mine)
        tl.store(row + 3, tl.zeros_like(block) + first, mask=mine)
        tl.store(row + 4, tl.zeros_like(block) + own_blocks, mask=mine)
    for start in range(0, num_slots, SLOTS_AT_ONCE):
        slot = start + tl.arange(0, SLOTS_AT_ONCE)
        chosen = local_expert(topk_ids, expert_map, slot, num_slots, num_experts, num_global, HAS_MAP) == expert
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(slots + begin + rank - 1, slot, mask=chosen)
        begin += tl.max(rank)


def global_experts(expert_map: torch.Tensor | None, num_experts: int) -> int:
    """How many ids there are: the length of the map where there is one."""
    return num_experts if expert_map is None else expert_map.shape[0]


def align(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    block_tokens: int,
    slots: torch.Tensor,
    blocks: torch.Tensor,
) -> None:
    """Sort the slots (token · top_k + k) by local expert and cut each expert's into blocks of `block_tokens`.

    topk_ids: integers `[num_tokens, top_k]`, contiguous; −1, or anything that is no expert's, for none.
    slots: int32 `[num_slots]`. blocks: int32 `[1 + max_blocks · 5]`: the number of blocks, then for each its expert, its
    first place in `slots`, its number of slots, the first block of its expert, and how many that expert has.
    """
    num_slots = topk_ids.numel()
    align_kernel[(num_experts,)](
        topk_ids, topk_ids if expert_map is None else expert_map, slots, blocks, num_slots, num_experts,
        global_experts(expert_map, num_experts),
        BLOCK_TOKENS=block_tokens, BINS=max(16, triton.next_power_of_2(num_experts + 1)),
        SLOTS_AT_ONCE=SLOTS_AT_ONCE, HAS_MAP=expert_map is not None, num_warps=4,
    )  # fmt: skip


def align_reference(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, block_tokens: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """What `align` writes, as lists: the sorted slots of local experts, and the rows of the table."""
    local = topk_ids.flatten().tolist()
    if expert_map is not None:
        local = [expert_map[expert].item() if 0 <= expert < len(expert_map) else -1 for expert in local]
    order: list[int] = []
    table: list[tuple[int, ...]] = []
    for expert in range(num_experts):
        mine = [slot for slot, chosen in enumerate(local) if chosen == expert]
        first, number = len(table), -(-len(mine) // block_tokens)
        for block in range(number):
            begin = block * block_tokens
            table.append((expert, len(order) + begin, min(block_tokens, len(mine) - begin), first, number))
        order += mine
    return order, table
