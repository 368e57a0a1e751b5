"""Test experts, the core's and an engine's, on the device with the model's own weights before they may serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from k26_plugins.common.experts.base import ExpertsBackend, ExpertWeights
from k26_plugins.common.experts.reference import dense_matrices, routed_sum

NUM_EXPERTS = 2
# hidden_states, topk_ids, topk_weights → the routed sum.
RoutedSum = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def self_test_error(backend: type[ExpertsBackend], weights: ExpertWeights) -> float:
    """Return the largest relative error of `backend` on copies of a few of these experts; the weights are not changed.

    The backend's results are compared with plain float32 GEMMs of the dequantized weights.
    """
    chosen = sorted({0, weights.num_experts - 1})[:NUM_EXPERTS]
    # Dequantized once for all batches: that is most of the test's time.
    matrices = [dense_matrices(weights.expert(index), torch.float32) for index in chosen]
    loaded = backend.load(weights.copy_of(chosen))

    def expected(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return routed_sum(hidden_states.float(), topk_ids, topk_weights, matrices.__getitem__, len(matrices))

    ids = torch.arange(len(chosen), dtype=torch.int32, device=weights.device)
    batches = backend.self_test_tokens
    return worst_error(loaded.apply, expected, ids, weights.hidden_size, batches, torch.bfloat16)


def worst_error(
    computed: RoutedSum,
    expected: RoutedSum,
    expert_ids: torch.Tensor,
    hidden_size: int,
    batches: Sequence[int],
    dtype: torch.dtype,
    scales: Sequence[float] = (1.0,),
) -> float:
    """Return the largest relative error ‖computed − expected‖ / ‖expected‖ over batches of random tokens.

    expert_ids: int32 `[n]`, on the device; every token chooses all of them. batches: the numbers of tokens. dtype: of
    the hidden states. scales: factors, by any one of which `computed` may multiply the sum. A result that is not finite
    counts as an infinite error.
    """
    device, worst = expert_ids.device, 0.0
    # Dtype and device are explicit because an engine sets its own defaults while it loads.
    drawn: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    for num_tokens in batches:
        hidden_states = torch.randn(num_tokens, hidden_size, **drawn).to(device=device, dtype=dtype)
        topk_ids = expert_ids.repeat(num_tokens, 1)
        topk_weights = torch.rand(num_tokens, len(expert_ids), **drawn).to(device) + 0.5
        right = expected(hidden_states, topk_ids, topk_weights)
        # Some kernels write their result over the hidden states.
        result = computed(hidden_states.clone(), topk_ids, topk_weights).float()
        least = right.norm().clamp(min=torch.finfo(torch.float32).tiny)
        errors = [((result / scale - right).norm() / least).item() for scale in scales]
        worst = max(worst, min(error if error == error else float("inf") for error in errors))
    return worst
