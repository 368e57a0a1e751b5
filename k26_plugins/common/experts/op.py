"""The experts as torch operators: torch.compile and graph capture go around them, never into them."""

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
    """Write the routed sum `[num_tokens, hidden_size]` of the weights, as `backend` repacked them, to `out`.

    Whoever owns the weights may move or overwrite them between two calls: nothing of them is kept here.
    """
    tensors = {"w13_packed": w13_packed, "w13_scale": w13_scale, "w2_packed": w2_packed, "w2_scale": w2_scale}
    experts = find_backend(backend).from_tensors(tensors)
    experts.apply(hidden_states, topk_ids, topk_weights, expert_map=expert_map, out=out, workspace=workspace)


# The operator gets experts that hold their weights themselves by number, since its arguments are tensors and plain values.
_holders: weakref.WeakValueDictionary[int, RoutedExperts] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(experts: RoutedExperts) -> int:
    """A number for `held_experts`, valid while the experts live; the caller keeps them."""
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
    """The same of experts whose weights no engine can hold: a library's own copies, or those in another memory."""
    _holders[number].apply(hidden_states, topk_ids, topk_weights, expert_map=expert_map, out=out)
