"""Tests of `batched_experts`, with one buffer of tokens per expert, against float64 on compressed-tensors' weights."""

from __future__ import annotations

import pytest
import torch
from k26_kernels import KernelExperts, batched_experts, batched_plan
from k26_kernels.reference import batched_experts_reference
from support.experts import error, inputs, judge, make_weights, to_device

from k26_plugins.common.experts import ExpertWeights

TOLERANCE = 5e-3
MAX_TOKENS = 40
# The experts' numbers of tokens: none, one, a full block, one more than a full block, a full buffer, and three.
COUNTS = [0, 1, 16, 17, MAX_TOKENS, 3]


def on(
    device: torch.device, num_experts: int, hidden_size: int, intermediate_size: int
) -> tuple[KernelExperts, ExpertWeights]:
    weights = make_weights(num_experts, hidden_size, intermediate_size)
    copy = to_device(weights, device)
    return KernelExperts.from_checkpoint(copy.w13_packed, copy.w13_scale, copy.w2_packed, copy.w2_scale), weights


@pytest.mark.parametrize("expected", [1.0, 40.0, 400.0])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(256, 128), (128, 256)])
def test_against_float64(device: torch.device, hidden_size: int, intermediate_size: int, expected: float) -> None:
    experts, weights = on(device, len(COUNTS), hidden_size, intermediate_size)
    x = inputs(len(COUNTS) * MAX_TOKENS, hidden_size).view(len(COUNTS), MAX_TOKENS, hidden_size).to(device)
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    out = torch.full_like(x, torch.nan)
    batched_experts(x, experts, counts, out, expected=expected)
    plain = batched_experts_reference(x, experts, counts)
    for expert, count in enumerate(COUNTS):
        assert out[expert, count:].isnan().all(), "a row without a token was written"
        if count:
            ids, ones = torch.full((count, 1), expert, dtype=torch.int32), torch.ones(count, 1)
            right = judge(weights, x[expert, :count].cpu(), ids, ones)
            assert error(out[expert, :count].cpu(), right) <= TOLERANCE
            assert error(plain[expert, :count].cpu(), right) <= 1e-5


def test_each_number_of_tokens_has_its_blocks(device: torch.device) -> None:
    experts, _ = on(device, 2, 128, 128)
    few, many = (
        batched_plan(experts.device, experts.shape, 256, expected, torch.bfloat16).config.BLOCK_SIZE_M
        for expected in (1.0, 250.0)
    )
    assert few == 16 < many


def test_a_count_beyond_the_buffer_reads_no_other_experts_tokens(device: torch.device) -> None:
    experts, _ = on(device, 2, 128, 128)
    x = inputs(2 * 8, 128).view(2, 8, 128).to(device)
    out, full = torch.zeros_like(x), torch.zeros_like(x)
    batched_experts(x, experts, torch.tensor([9, -1], dtype=torch.int32, device=device), out, expected=8)
    batched_experts(x, experts, torch.tensor([8, 0], dtype=torch.int32, device=device), full, expected=8)
    assert torch.equal(out, full)
    assert not out[1].any()


def test_other_shapes_are_refused(device: torch.device) -> None:
    experts, _ = on(device, 2, 128, 128)
    x = inputs(2 * 4, 128).view(2, 4, 128).to(device)
    counts = torch.ones(2, dtype=torch.int32, device=device)
    for arguments in ((x[:1], counts, x[:1]), (x, counts.long(), x), (x, counts, x[:, :2])):
        with pytest.raises(ValueError, match="expected"):
            batched_experts(arguments[0], experts, arguments[1], arguments[2], expected=1)
