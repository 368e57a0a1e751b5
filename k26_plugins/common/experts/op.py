"""The experts as one torch operator: torch.compile and graph capture go around it, never into it."""

from __future__ import annotations

import itertools
import weakref

import torch

from k26_plugins.common.experts.base import RoutedExperts

# The operator gets a layer's backend by number, because an operator's arguments are tensors and plain values.
_backends: weakref.WeakValueDictionary[int, RoutedExperts] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(backend: RoutedExperts) -> int:
    """A number for `routed_experts`, valid while the backend lives; the caller keeps the backend."""
    number = next(_numbers)
    _backends[number] = backend
    return number


@torch.library.custom_op("k26::routed_experts", mutates_args=())
def routed_experts(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    backend: int,
) -> torch.Tensor:
    """The routed sum `[num_tokens, hidden_size]` of the layer whose backend has this number."""
    return _backends[backend].apply(hidden_states, topk_ids, topk_weights, expert_map=expert_map)


@routed_experts.register_fake
def _(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    backend: int,
) -> torch.Tensor:
    return torch.empty_like(hidden_states)
