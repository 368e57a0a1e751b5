"""The test that experts pass on the device, with the model's own weights, before they may serve: ours and the engine's."""

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
    """The largest relative error of `backend` on copies of a few of these experts, which are not changed.

    The reference dequantizes the weights, and its plain GEMMs are in float32.
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
    """The largest relative error ‖computed − expected‖ / ‖expected‖ over batches of so many tokens.

    expert_ids: int32 `[n]`, on the device; every token chooses all of them. dtype: of the hidden states. scales: what is
    computed may be any of these times the sum. A result that is not finite counts as infinite.
    """
    device, worst = expert_ids.device, 0.0
    # An engine loads with its own default dtype and device.
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
