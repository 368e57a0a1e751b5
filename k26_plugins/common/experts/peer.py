"""What the core's kernels are measured against: an engine's, from the checkpoint's tensors to a function."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from k26_plugins.common.experts.base import ExpertWeights

# hidden_states, topk_weights, topk_ids, expert_map → the routed sum.
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# Takes the weights as they are and leaves them so. Raises NotHereError, or whatever a kernel makes of another GPU.
Peer = Callable[[ExpertWeights], Run]


class NotHereError(Exception):
    """A kernel that cannot run on this machine; the message is its row in the table."""


def require(module: str) -> None:
    """Raises NotHereError for a package that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise NotHereError(f"{module} is not installed")


def asking_for(ids: torch.Tensor, topk_weights: torch.Tensor, num_global: int) -> torch.Tensor:
    """float32 `[num_tokens, num_global]`: for a kernel that routes by itself, logits by which it chooses `ids`.

    Their sigmoids are the weights, which the kernel divides by their sum.
    """
    logits = torch.full((len(ids), num_global), -30.0, device=ids.device)
    return logits.scatter_(1, ids.long(), torch.logit(topk_weights.clamp(1e-4, 1 - 1e-4)))
