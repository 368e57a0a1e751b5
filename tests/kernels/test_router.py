"""The router in one launch, against the core's and against the plain one beside it."""

from __future__ import annotations

import pytest
import torch
from k26_kernels.router import route, route_reference

from k26_plugins.common.model.router import route as core_route


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 384, 8), (9, 384, 8), (5, 7, 3), (4, 16, 16), (0, 384, 8)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_core(
    device: torch.device, num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, generator=generator).to(dtype)
    bias = torch.randn(num_experts, generator=generator) * 0.1
    weights, ids = route(logits.to(device), bias.to(device), top_k, 2.827)
    expected_weights, expected_ids = core_route(logits, bias, top_k, 2.827)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.cpu().long(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-5, atol=1e-6)


def test_the_lowest_of_equal_experts_is_taken(device: torch.device) -> None:
    logits = torch.zeros(2, 40)
    logits[1, 30:] = 1.0
    bias = torch.zeros(40)
    weights, ids = route(logits.to(device), bias.to(device), 4, 1.0, ids_dtype=torch.int64)
    expected_weights, expected_ids = route_reference(logits, bias, 4, 1.0)
    assert ids.tolist() == expected_ids.tolist() == [[0, 1, 2, 3], [30, 31, 32, 33]]
    torch.testing.assert_close(weights.cpu(), expected_weights)


def test_what_is_not_a_number_is_not_hidden(device: torch.device) -> None:
    """As in the core's router the expert is chosen, and none of the token's weights is a number. Other tokens stay right."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 17] = float("nan")
    bias = torch.zeros(40)
    weights, ids = (values.cpu() for values in route(logits.to(device), bias.to(device), 4, 2.0))
    expected_weights, expected_ids = core_route(logits, bias, 4, 2.0)
    torch.testing.assert_close(weights, expected_weights, equal_nan=True)
    assert weights[1].isnan().all()
    assert ids[1].tolist()[0] == expected_ids[1].tolist()[0] == 17
    assert torch.equal(ids[[0, 2]].long(), expected_ids[[0, 2]])


def test_weights_that_are_not_normalized(device: torch.device) -> None:
    logits, bias = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)), torch.zeros(12)
    weights, ids = route(logits.to(device), bias.to(device), 2, 1.5, normalize=False)
    torch.testing.assert_close(weights.cpu(), 1.5 * torch.sigmoid(logits).gather(1, ids.cpu().long()))
