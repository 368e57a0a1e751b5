"""Compile every variant of the kernels that batches of any size can launch, before the first batch comes."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch

from k26_kernels.batched import batched_experts, batched_plan
from k26_kernels.config import KernelConfig, Shape
from k26_kernels.experts import TOKENS_AT_ONCE, KernelExperts, Plan, fused_experts, make_plan
from k26_kernels.target import Device, device_of

# Fields of a plan that become arguments of launches or sizes of grids: the compiled code is the same for any value.
_NUMBERS = {"num_pairs", "max_blocks", "sections", "bytes"}


def batch_sizes(
    device: Device, shape: Shape, top_k: int, global_experts: int, batch_invariant: bool = False
) -> list[int]:
    """Return the least number of tokens for each variant; their plans launch every variant that any batch launches."""
    least: dict[tuple[Any, ...], int] = {}
    for num_tokens in range(1, TOKENS_AT_ONCE + 1):
        # This bypasses the plans' cache, which would forget the plans of real batches.
        plan = make_plan.__wrapped__(device, shape, num_tokens, top_k, global_experts, batch_invariant)
        least.setdefault(_variant(plan), num_tokens)
    return list(least.values())


def _variant(plan: Plan) -> tuple[Any, ...]:
    """Return the parts of a plan that decide which code its launches run.

    An empty section means that the launch which would use it is not made.
    """
    decided = tuple(getattr(plan, field.name) for field in fields(plan) if field.name not in _NUMBERS)
    return *decided, *(name for name, (_, size) in plan.sections.items() if size)


def compile_variants(
    device: torch.device,
    shape: Shape,
    top_k: int,
    out_dtype: torch.dtype,
    *,
    num_global_experts: int | None = None,
    batch_invariant: bool = False,
) -> int:
    """Launch all variants of `fused_experts` for experts of this shape, and return their number.

    The pairs of these launches choose no expert. num_global_experts: the length of the expert map that batches come
    with, None if they come without one. Ids and map are int32 here, and must be int32 in the batches too. This needs
    the memory of one expert and of the largest of `batch_sizes`.
    """
    filled, experts = partial(_filled, device), _one_expert(device, shape)
    expert_map = None if num_global_experts is None else filled(-1, num_global_experts, dtype=torch.int32)
    sizes = batch_sizes(experts.device, shape, top_k, num_global_experts or shape.num_experts, batch_invariant)
    for num_tokens in sizes:
        fused_experts(
            filled(0, num_tokens, shape.hidden_size, dtype=torch.bfloat16),
            experts,
            filled(-1, num_tokens, top_k, dtype=torch.int32),
            filled(0, num_tokens, top_k, dtype=torch.float32),
            expert_map=expert_map,
            out=filled(0, num_tokens, shape.hidden_size, dtype=out_dtype),
            batch_invariant=batch_invariant,
        )
    return len(sizes)


def compile_batched(
    device: torch.device, shape: Shape, out_dtype: torch.dtype, *, batch_invariant: bool = False
) -> int:
    """Launch all variants of `batched_experts` for experts of this shape, and return their number.

    The buffers of these launches hold no token.
    """
    filled, experts = partial(_filled, device), _one_expert(device, shape)
    least: dict[KernelConfig, int] = {}
    for number in range(TOKENS_AT_ONCE + 1):
        least.setdefault(batched_plan(experts.device, shape, 1, number, out_dtype, batch_invariant).config, number)
    for expected in least.values():
        batched_experts(
            filled(0, shape.num_experts, 1, shape.hidden_size, dtype=torch.bfloat16),
            experts,
            filled(0, shape.num_experts, dtype=torch.int32),
            filled(0, shape.num_experts, 1, shape.hidden_size, dtype=out_dtype),
            expected=expected,
            batch_invariant=batch_invariant,
        )
    return len(least)


def _filled(device: torch.device, value: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(size, value, dtype=dtype, device=device)


def _one_expert(device: torch.device, shape: Shape) -> KernelExperts:
    """Return experts of this shape of which only the first has weights.

    Nothing is computed for experts that no pair chooses, but the first one's weights may be loaded ahead.
    """
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    return KernelExperts(
        _filled(device, 0, 1, 2 * intermediate_size, hidden_size // 8, dtype=torch.int32),
        _filled(device, 0, 1, 2 * intermediate_size, hidden_size // 32, dtype=torch.bfloat16),
        _filled(device, 0, 1, hidden_size, intermediate_size // 8, dtype=torch.int32),
        _filled(device, 0, 1, hidden_size, intermediate_size // 32, dtype=torch.bfloat16),
        device_of(device),
        shape,
    )
