"""Define a peer: an engine's kernel that the core's are measured against, as a function of the checkpoint's tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from k26_plugins.common.experts.base import ExpertWeights

# hidden_states, topk_weights, topk_ids, expert_map → the routed sum.
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# Takes the checkpoint's weights, which it leaves unchanged, and returns the function that computes with them. Raises
# NotHereError, or whatever error a kernel raises on a GPU that it does not support.
Peer = Callable[[ExpertWeights], Run]


class NotHereError(Exception):
    """Raised for a kernel that cannot run on this machine; the message is the kernel's row in the table."""


def require(module: str) -> None:
    """Raise NotHereError if a package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise NotHereError(f"{module} is not installed")


def asking_for(ids: torch.Tensor, topk_weights: torch.Tensor, num_global: int) -> torch.Tensor:
    """Return logits, float32 `[num_tokens, num_global]`, by which a kernel that routes by itself chooses `ids`.

    The sigmoids of a token's logits are its `topk_weights`, which the kernel divides by their sum.
    """
    logits = torch.full((len(ids), num_global), -30.0, device=ids.device)
    return logits.scatter_(1, ids.long(), torch.logit(topk_weights.clamp(1e-4, 1 - 1e-4)))
