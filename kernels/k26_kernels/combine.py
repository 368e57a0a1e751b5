"""Compute the two sums of a call in a fixed order: w13's split-K partials with silu_and_mul, and a token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from k26_kernels.align import local_expert
from k26_kernels.dependent import after_previous
from k26_kernels.unpack import rounded


@triton.jit
def silu_and_mul_kernel(
    partials: tl.tensor, out: tl.tensor, partial_stride: tl.tensor,
    I: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Write silu(gate) · up of the summed split-K partials. Program (pair, block of the intermediate size).

    partials: float32 `[SPLIT_K, num_pairs, 2 I]`, rows as layout.py interleaves them. out: bfloat16 `[num_pairs, I]`.
    """
    after_previous(DEPENDENT)
    pair = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = partials + pair * (2 * I) + i // 8 * 16 + i % 8
    gate = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    for part in range(SPLIT_K):
        gate += tl.load(row + part * partial_stride, mask=i < I)
        up += tl.load(row + part * partial_stride + 8, mask=i < I)
    tl.store(out + pair * I + i, rounded(gate * tl.sigmoid(gate) * up, tl.bfloat16), mask=i < I)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_global"])
def reduce_kernel(
    y: tl.tensor, topk_ids: tl.tensor, expert_map: tl.tensor, out: tl.tensor,
    num_pairs: tl.tensor, num_experts: tl.tensor, num_global: tl.tensor,
    H: tl.constexpr, TOP_K: tl.constexpr, SPLIT_K: tl.constexpr, HAS_MAP: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Write the sum over a token's pairs and their split-K partials, in order. Program (token, block of hidden size).

    y: `[SPLIT_K, num_pairs, H]`; the rows of a pair without a local expert hold nothing and are left out.
    out: `[num_tokens, H]`.
    """
    after_previous(DEPENDENT)
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        expert = local_expert(topk_ids, expert_map, pair, num_pairs, num_experts, num_global, HAS_MAP)
        end = tl.where(expert >= 0, H, 0)
        for part in range(SPLIT_K):
            place = (part * num_pairs + pair).to(tl.int64) * H
            total += tl.load(y + place + h, mask=h < end, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * H + h, rounded(total, out.dtype.element_ty), mask=h < H)
