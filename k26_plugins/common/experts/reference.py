"""Compute the experts in plain PyTorch, in float32: the reference with which the other backends are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
import torch.nn.functional as F

from k26_plugins.common.experts.base import (
    Expert,
    ExpertsBackend,
    ExpertWeights,
    RoutedBatch,
    Sizes,
    tokens_by_expert,
)
from k26_plugins.common.model.int4 import dequantize


def reference_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert: Callable[[int], Expert],
    num_experts: int,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the routed sum `[num_tokens, hidden_size]`, in float64 if `hidden_states` is float64, else in float32.

    `expert(index)` is called once for each expert that a token chose, so that experts can be read one by one from a
    mapped checkpoint. Shapes and dtypes are those of `RoutedExperts.apply`.
    """
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    return routed_sum(
        hidden_states.to(dtype),
        topk_ids,
        topk_weights,
        lambda index: dense_matrices(expert(index), dtype),
        num_experts,
        expert_map,
    )


def dense_matrices(packed: Expert, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an expert's dequantized w13 `[2 I, H]` and w2 `[H, I]`, both in `dtype`."""
    w13 = dequantize(packed.w13_packed, packed.w13_scale, dtype)
    return w13, dequantize(packed.w2_packed, packed.w2_scale, dtype)


def routed_sum(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    matrices: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    num_experts: int,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the routed sum `[num_tokens, hidden_size]` of experts that are given as dense matrices.

    x: float32 or float64 `[num_tokens, hidden_size]`. topk_ids, topk_weights, expert_map: as for `RoutedExperts.apply`.
    matrices: returns w13 `[2 I, H]` and w2 `[H, I]` of an expert, in the dtype of `x`, which is also the result's.
    """
    weights = topk_weights.to(x.dtype).flatten()
    out = torch.zeros_like(x)
    for index, pairs in tokens_by_expert(topk_ids, expert_map, num_experts):
        w13, w2 = matrices(index)
        tokens = pairs // topk_ids.shape[1]
        gate, up = (x[tokens] @ w13.T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w2.T
        out.index_add_(0, tokens, y * weights[pairs].unsqueeze(-1))
    return out


class ReferenceExperts(ExpertsBackend):
    """Experts in plain PyTorch on any device, which dequantizes each expert that a token chose. This is slow."""

    name = "reference"
    device_type = None
    activation_dtype = None

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__(weights)
        self.weights = weights

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """Return None, since this backend takes every size and every device."""
        return None

    @classmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Keep the weights as they are."""
        return cls(weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the checkpoint's four tensors."""
        return {
            "w13_packed": self.weights.w13_packed,
            "w13_scale": self.weights.w13_scale,
            "w2_packed": self.weights.w2_packed,
            "w2_scale": self.weights.w2_scale,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Take the checkpoint's four tensors over."""
        return cls(ExpertWeights(**tensors))

    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """Return the tensors as they are, since nothing was repacked."""
        return ExpertWeights(**tensors)

    def _forward(self, batch: RoutedBatch) -> None:
        """Dequantize one expert after the other and multiply in plain PyTorch."""
        inputs = (batch.hidden_states, batch.topk_ids, batch.topk_weights)
        result = reference_experts(*inputs, self.weights.expert, self.weights.num_experts, batch.expert_map)
        batch.out.copy_(result)
