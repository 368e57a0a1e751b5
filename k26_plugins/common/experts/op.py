"""Offer the experts as torch operators, which torch.compile and graph capture call without tracing into them."""

from __future__ import annotations

import itertools
import weakref

import torch

from k26_plugins.common.experts import find_backend
from k26_plugins.common.experts.base import RoutedExperts


@torch.library.custom_op("k26::routed_experts", mutates_args=("out", "workspace"))
def routed_experts(
    out: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13_packed: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_packed: torch.Tensor,
    w2_scale: torch.Tensor,
    workspace: torch.Tensor | None,
    backend: str,
) -> None:
    """Write the routed sum `[num_tokens, hidden_size]` to `out`, with weights that `backend` has repacked.

    out: a floating dtype `[num_tokens, hidden_size]`. hidden_states: a floating dtype `[num_tokens, hidden_size]`, most
    often bfloat16. topk_weights: float32 `[num_tokens, top_k]`. topk_ids: integers `[num_tokens, top_k]`. expert_map:
    integers `[num_global_experts]` or None. w13_packed, w2_packed: int32 `[E, …]`; w13_scale, w2_scale: bfloat16
    `[E, …]`, all as the `tensors()` of the backend. workspace: uint8, at least `RoutedExperts.workspace_bytes`
    elements, or None. All are on one device.

    The owner of the weights may move or overwrite them between two calls, because the operator keeps nothing of them.
    """
    tensors = {"w13_packed": w13_packed, "w13_scale": w13_scale, "w2_packed": w2_packed, "w2_scale": w2_scale}
    experts = find_backend(backend).from_tensors(tensors)
    experts.apply(hidden_states, topk_ids, topk_weights, expert_map=expert_map, out=out, workspace=workspace)


# Experts that hold their weights themselves, by the number that `held_experts` gets: an operator's arguments can only
# be tensors and plain values.
_holders: weakref.WeakValueDictionary[int, RoutedExperts] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(experts: RoutedExperts) -> int:
    """Return a number by which `held_experts` finds these experts while they live; the caller must keep them alive."""
    number = next(_numbers)
    _holders[number] = experts
    return number


@torch.library.custom_op("k26::held_experts", mutates_args=("out",))
def held_experts(
    out: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    number: int,
) -> None:
    """Write the routed sum to `out` like `routed_experts`, for experts whose weights no engine can hold.

    Such weights are a library's own copies, or lie in another memory. Shapes and dtypes are those of `routed_experts`.
    number: as `number_of` gave it.
    """
    _holders[number].apply(hidden_states, topk_ids, topk_weights, expert_map=expert_map, out=out)
