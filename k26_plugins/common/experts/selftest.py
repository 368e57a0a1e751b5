"""The test that every backend passes on the device, with the model's own weights, before it may serve."""

from __future__ import annotations

import torch

from k26_plugins.common.experts.base import ExpertsBackend, ExpertWeights
from k26_plugins.common.experts.reference import reference_experts

NUM_EXPERTS = 2


def self_test_error(backend: type[ExpertsBackend], weights: ExpertWeights) -> float:
    """The largest relative error ‖out − ref‖ / ‖ref‖ of `backend` on copies of a few of these experts.

    The reference is the plain dequantised product in float32. A result that is not finite counts as infinite. The
    weights are not changed.
    """
    chosen = sorted({0, weights.num_experts - 1})[:NUM_EXPERTS]
    original = weights.copy_of(chosen)
    loaded = backend.load(weights.copy_of(chosen))
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for num_tokens in backend.self_test_tokens:
        hidden_states = torch.randn(num_tokens, weights.hidden_size, generator=generator)
        hidden_states = hidden_states.to(device=weights.device, dtype=torch.bfloat16)
        topk_ids = torch.arange(len(chosen), device=weights.device, dtype=torch.int32).repeat(num_tokens, 1)
        topk_weights = torch.rand(topk_ids.shape, generator=generator).to(weights.device) + 0.5
        expected = reference_experts(hidden_states.float(), topk_ids, topk_weights, original.expert, len(chosen))
        result = loaded.apply(hidden_states, topk_ids, topk_weights).float()
        error = ((result - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst
