"""Compute experts for tokens that lie in a buffer for each expert, as DeepEP's low-latency dispatch hands them over.

Nothing is sorted, because the table of blocks follows from each expert's number of tokens. An expert's results are
written to the same places as its tokens. The engine, which sends them back, applies the routing weights and adds up the
experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from k26_kernels.align import COLUMNS, num_bins, write_blocks
from k26_kernels.config import INVARIANT, Shape, kernel_configs, least_work
from k26_kernels.dependent import after_previous, launch_options
from k26_kernels.experts import KernelExperts, Launcher, Plan, sections_of
from k26_kernels.target import Device

TOKENS_WRITTEN = 256


@triton.jit(do_not_specialize=["max_tokens", "num_experts"])
def table_kernel(
    counts: tl.tensor, sorted_pairs: tl.tensor, blocks: tl.tensor, max_tokens: tl.tensor, num_experts: tl.tensor,
    BLOCK_SIZE_M: tl.constexpr, BINS: tl.constexpr, TOKENS_WRITTEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:  # fmt: skip
    """Write the table of blocks: program e writes expert e's rows and its pairs, which are its tokens' places."""
    after_previous(DEPENDENT)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins, mask=bins < num_experts, other=0).to(tl.int32)
    # With a count beyond the buffer the GEMMs would read another expert's tokens.
    count = tl.maximum(tl.minimum(count, max_tokens), 0)
    first = tl.sum(tl.where(bins < expert, (count + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M, 0))
    own = tl.sum(tl.where(bins == expert, count, 0))
    begin = expert * max_tokens
    write_blocks(blocks, expert, begin, first, own, num_experts, BLOCK_SIZE_M)
    for start in range(0, own, TOKENS_WRITTEN):
        token = start + tl.arange(0, TOKENS_WRITTEN)
        tl.store(sorted_pairs + begin + token, begin + token, mask=token < own)


def batched_plan(
    device: Device,
    shape: Shape,
    max_tokens: int,
    expected: float,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Plan:
    """Return the plan for buffers of `max_tokens` tokens each.

    shape: the experts', which says how many buffers there are. expected: the mean number of tokens of an expert,
    because the host does not know their counts. out_dtype: of `out`. The plan's `bytes` are those of the workspace.
    """
    choices = kernel_configs(device, shape)
    config = choices[INVARIANT if batch_invariant else least_work(choices, expected)]
    num_pairs = shape.num_experts * max_tokens
    num_blocks = shape.num_experts * -(-max_tokens // config.BLOCK_SIZE_M)
    sections, total = sections_of(
        {
            "activated": 2 * num_pairs * shape.intermediate_size,
            "sorted_pairs": 4 * num_pairs,
            "blocks": 4 * (1 + COLUMNS.value * num_blocks),
        }
    )
    return Plan(config, True, 1, 1, num_pairs, num_blocks, out_dtype, sections, total)


def batched_experts(
    hidden_states: torch.Tensor,
    experts: KernelExperts,
    counts: torch.Tensor,
    out: torch.Tensor,
    *,
    expected: float,
    batch_invariant: bool = False,
) -> None:
    """Write down(silu(gate · x) · (up · x)) of the first `counts[e]` tokens in expert e's buffer to `out`.

    Other rows of `out` are not written. hidden_states: bfloat16 `[num_experts, max_tokens, hidden_size]`, contiguous.
    counts: int32 `[num_experts]`, contiguous. out: `[num_experts, max_tokens, hidden_size]`, contiguous, of any
    floating dtype. expected: the mean number of tokens of an expert. All tensors are on the
    device of `experts`. Raises ValueError for inputs of another shape or dtype.
    """
    shape = experts.shape
    expected_shape = (shape.num_experts, hidden_states.shape[1], shape.hidden_size)
    if hidden_states.shape != expected_shape or hidden_states.dtype != torch.bfloat16:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype} {list(hidden_states.shape)}, expected torch.bfloat16 "
            f"{list(expected_shape)}."
        )
    if out.shape != expected_shape or not (out.is_contiguous() and hidden_states.is_contiguous()):
        raise ValueError(f"out is {list(out.shape)}, expected it and hidden_states contiguous, {list(expected_shape)}.")
    if counts.shape != expected_shape[:1] or counts.dtype != torch.int32:
        raise ValueError(f"counts are {counts.dtype} {list(counts.shape)}, expected torch.int32 [{shape.num_experts}].")
    max_tokens = expected_shape[1]
    plan = batched_plan(experts.device, shape, max_tokens, expected, out.dtype, batch_invariant)
    workspace = torch.empty(plan.bytes, dtype=torch.uint8, device=hidden_states.device)
    # The GEMMs below read neither ids nor routing weights, so `counts` stands in for both.
    launcher = Launcher(experts, plan, workspace, counts, counts, None)
    sorted_pairs, blocks = (launcher.section(name, torch.int32) for name in ("sorted_pairs", "blocks"))
    table_kernel[(shape.num_experts,)](
        counts, sorted_pairs, blocks, max_tokens, shape.num_experts,
        BLOCK_SIZE_M=plan.config.BLOCK_SIZE_M, BINS=num_bins(shape.num_experts), TOKENS_WRITTEN=TOKENS_WRITTEN,
        num_warps=4, **launch_options(experts.device.target.dependent),
    )  # fmt: skip
    activated = launcher.section("activated", torch.bfloat16)
    w13, w2 = (experts.w13_packed, experts.w13_scale), (experts.w2_packed, experts.w2_scale)
    launcher.gemm(hidden_states, *w13, activated, plan.config.w13, 1, "silu_and_mul", 1)
    launcher.gemm(activated, *w2, out, plan.config.w2, 1, "plain", 1)
