"""Sort token–expert pairs by expert and build a table of their blocks on the device, so that the host does not wait.

A pair is token · top_k + k. Up to PAIRS_AT_ONCE pairs are sorted in one launch, in which every expert's program reads
all pairs. More pairs take two launches: `count_kernel` counts the pairs of each chunk by expert, and `place_kernel`
adds the counts up and puts each chunk's pairs in their places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from k26_kernels.dependent import after_previous, launch_options

COLUMNS = tl.constexpr(5)  # columns of the table of blocks
PAIRS_AT_ONCE = 1024
PAIRS_RANKED = 32  # pairs of a chunk that are compared with each other at a time
# Least number of programs of `place_kernel`, so that each writes the table's rows of a few experts only.
PLACERS = 64


def max_blocks(num_pairs: int, num_experts: int, block_size: int) -> int:
    """Return the most blocks that any choice of experts can give: each expert leaves at most one block unfilled."""
    return min(num_pairs, num_pairs // block_size + min(num_experts, num_pairs))


@triton.jit
def local_expert(
    topk_ids: tl.tensor, expert_map: tl.tensor, pair: tl.tensor,
    num_pairs: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor, HAS_MAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the local expert of each pair, negative if its expert is not on this rank."""
    chosen = tl.load(topk_ids + pair, mask=pair < num_pairs, other=-1)
    if HAS_MAP:
        # An id beyond the map's end would read other memory.
        chosen = tl.load(expert_map + chosen, mask=(chosen >= 0) & (chosen < num_global), other=-1)
    return tl.where(chosen < num_experts, chosen, -1).to(tl.int32)


@triton.jit
def write_blocks(
    blocks: tl.tensor, expert: tl.tensor, begin: tl.tensor, first: tl.tensor, count: tl.tensor,
    num_experts: tl.tensor, BLOCK_SIZE_M: tl.constexpr,
) -> None:  # fmt: skip
    """Write an expert's rows of the table of blocks, and for the last expert also the number of all rows."""
    own_blocks = (count + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M
    if expert == num_experts - 1:
        tl.store(blocks, first + own_blocks)
    for start in range(0, own_blocks, 32):
        block = start + tl.arange(0, 32)
        mine = block < own_blocks
        row = blocks + 1 + (first + block) * COLUMNS
        tl.store(row, tl.zeros_like(block) + expert, mask=mine)
        tl.store(row + 1, begin + block * BLOCK_SIZE_M, mask=mine)
        tl.store(row + 2, tl.minimum(count - block * BLOCK_SIZE_M, BLOCK_SIZE_M), mask=mine)
        tl.store(row + 3, tl.zeros_like(block) + first, mask=mine)
        tl.store(row + 4, tl.zeros_like(block) + own_blocks, mask=mine)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_global"])
def align_kernel(
    topk_ids: tl.tensor, expert_map: tl.tensor, sorted_pairs: tl.tensor, blocks: tl.tensor,
    num_pairs: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor,
    BLOCK_SIZE_M: tl.constexpr, BINS: tl.constexpr, PAIRS_AT_ONCE: tl.constexpr, HAS_MAP: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Sort at most PAIRS_AT_ONCE pairs. Program e writes expert e's pairs, in order, and its rows of the table.

    Every program counts the pairs of all experts itself, because for so few pairs this costs less than a second launch.
    """
    after_previous(DEPENDENT)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    pair = tl.arange(0, PAIRS_AT_ONCE)
    local = local_expert(topk_ids, expert_map, pair, num_pairs, num_experts, num_global, HAS_MAP)
    counts = tl.histogram(tl.where(local < 0, BINS - 1, local), BINS)
    counts = tl.where(bins < num_experts, counts, 0)
    num_blocks = (counts + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M
    before = bins < expert
    begin = tl.sum(tl.where(before, counts, 0))
    first = tl.sum(tl.where(before, num_blocks, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    write_blocks(blocks, expert, begin, first, count, num_experts, BLOCK_SIZE_M)
    chosen = local == expert
    tl.store(sorted_pairs + begin + tl.cumsum(chosen.to(tl.int32), 0) - 1, pair, mask=chosen)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_global"])
def count_kernel(
    topk_ids: tl.tensor, expert_map: tl.tensor, counts: tl.tensor,
    num_pairs: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor,
    BINS: tl.constexpr, PAIRS_AT_ONCE: tl.constexpr, HAS_MAP: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Count pairs by expert, in program c those of chunk c.

    counts: int32 `[num_chunks, BINS]`; the last bin is for the pairs without a local expert.
    """
    after_previous(DEPENDENT)
    pair = tl.program_id(0) * PAIRS_AT_ONCE + tl.arange(0, PAIRS_AT_ONCE)
    local = local_expert(topk_ids, expert_map, pair, num_pairs, num_experts, num_global, HAS_MAP)
    found = tl.histogram(tl.where(local < 0, BINS - 1, local), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_global"])
def place_kernel(
    topk_ids: tl.tensor, expert_map: tl.tensor, counts: tl.tensor, sorted_pairs: tl.tensor, blocks: tl.tensor,
    num_pairs: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor,
    BLOCK_SIZE_M: tl.constexpr, BINS: tl.constexpr, PAIRS_AT_ONCE: tl.constexpr, PAIRS_RANKED: tl.constexpr,
    HAS_MAP: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Put pairs in their places, in program c those of chunk c, and write the table's rows of every n-th expert.

    n is the number of programs.
    """
    after_previous(DEPENDENT)
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    earlier = tl.zeros([BINS], tl.int32)  # in the chunks before this one
    for chunk in range(tl.cdiv(num_pairs, PAIRS_AT_ONCE)):
        found = tl.load(counts + chunk * BINS + bins)
        total += found
        earlier += tl.where(chunk < program, found, 0)
    total = tl.where(bins < num_experts, total, 0)
    num_blocks = (total + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M
    begins = tl.cumsum(total, 0) - total
    firsts = tl.cumsum(num_blocks, 0) - num_blocks
    for expert in range(program, num_experts, tl.num_programs(0)):
        mine = bins == expert
        begin = tl.sum(tl.where(mine, begins, 0))
        first = tl.sum(tl.where(mine, firsts, 0))
        count = tl.sum(tl.where(mine, total, 0))
        write_blocks(blocks, expert, begin, first, count, num_experts, BLOCK_SIZE_M)
    place = begins + earlier
    number = tl.arange(0, PAIRS_RANKED)
    for start in range(program * PAIRS_AT_ONCE, min((program + 1) * PAIRS_AT_ONCE, num_pairs), PAIRS_RANKED):
        local = local_expert(topk_ids, expert_map, start + number, num_pairs, num_experts, num_global, HAS_MAP)
        # A pair's rank is the number of earlier pairs here with its expert. Their keys are smaller by 1 up to the
        # pair's number; the unsigned difference of any other key is larger.
        key = local * PAIRS_RANKED + number
        difference = (key[:, None] - key[None, :] - 1).to(tl.uint32, bitcast=True)
        rank = tl.sum((difference < number[:, None]).to(tl.int32), 1)
        counter = tl.where(local < 0, BINS - 1, local)
        tl.store(sorted_pairs + tl.gather(place, counter, 0) + rank, start + number, mask=local >= 0)
        place += tl.histogram(counter, BINS)


def global_experts(expert_map: torch.Tensor | None, num_experts: int) -> int:
    """Return how many expert ids there are: the length of the map, or without a map the number of local experts.

    expert_map: int32 `[num_global_experts]`, or None.
    """
    return num_experts if expert_map is None else expert_map.shape[0]


def num_bins(num_experts: int) -> int:
    """Return a power of two that is enough counts: one for each expert and one for the pairs without a local expert."""
    return max(16, 1 << num_experts.bit_length())


def counts_bytes(num_pairs: int, num_experts: int) -> int:
    """Return the bytes of `counts`, which `moe_align_block_size` needs as scratch memory."""
    return 4 * triton.cdiv(num_pairs, PAIRS_AT_ONCE) * num_bins(num_experts) if num_pairs > PAIRS_AT_ONCE else 0


def moe_align_block_size(
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    block_size: int,
    sorted_pairs: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """Sort the token–expert pairs by local expert and cut each expert's into blocks of `block_size`.

    vLLM's and SGLang's functions of this name pad every expert's last block with pairs that do not exist. Here a table
    says how many pairs each block has, so that nothing is padded.

    topk_ids: integers `[num_tokens, top_k]`, contiguous; −1, or any other number that names no expert, for none.
    expert_map: int32 `[num_global_experts]`, the local index of each global id, −1 for an expert of another rank; None
    if the ids are local. num_experts: how many experts this rank has. sorted_pairs: int32 `[num_pairs]`, written.
    blocks: int32 `[1 + 5 · max_blocks(num_pairs, num_experts, block_size)]`, written: the number of blocks, then for
    each block its expert, its first place in `sorted_pairs`, its number of pairs, its expert's first block, and its
    expert's number of blocks. counts: int32 scratch memory of `counts_bytes` bytes. All tensors are on one device.
    dependent: as `launch_options` takes it.
    """
    num_pairs = topk_ids.numel()
    chosen = topk_ids, topk_ids if expert_map is None else expert_map
    numbers = num_pairs, num_experts, global_experts(expert_map, num_experts)
    bins, options = num_bins(num_experts), {"HAS_MAP": expert_map is not None, **launch_options(dependent)}
    if num_pairs <= PAIRS_AT_ONCE:
        align_kernel[(num_experts,)](
            *chosen, sorted_pairs, blocks, *numbers,
            BLOCK_SIZE_M=block_size, BINS=bins, PAIRS_AT_ONCE=PAIRS_AT_ONCE, num_warps=4, **options,
        )  # fmt: skip
        return
    chunks = triton.cdiv(num_pairs, PAIRS_AT_ONCE)
    count_kernel[(chunks,)](*chosen, counts, *numbers, BINS=bins, PAIRS_AT_ONCE=PAIRS_AT_ONCE, num_warps=4, **options)
    place_kernel[(max(chunks, PLACERS),)](
        *chosen, counts, sorted_pairs, blocks, *numbers,
        BLOCK_SIZE_M=block_size, BINS=bins, PAIRS_AT_ONCE=PAIRS_AT_ONCE, PAIRS_RANKED=PAIRS_RANKED,
        num_warps=4, **options,
    )  # fmt: skip


def moe_align_block_size_reference(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int, block_size: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return what `moe_align_block_size` writes, as lists: the sorted pairs of local experts, and the table's rows.

    topk_ids: integers `[num_tokens, top_k]`. expert_map: integers `[num_global_experts]`, or None.
    """
    local = topk_ids.flatten().tolist()
    if expert_map is not None:
        local = [expert_map[expert].item() if 0 <= expert < len(expert_map) else -1 for expert in local]
    order: list[int] = []
    table: list[tuple[int, ...]] = []
    for expert in range(num_experts):
        mine = [pair for pair, chosen in enumerate(local) if chosen == expert]
        first, number = len(table), -(-len(mine) // block_size)
        for block in range(number):
            begin = block * block_size
            table.append((expert, len(order) + begin, min(block_size, len(mine) - begin), first, number))
        order += mine
    return order, table
