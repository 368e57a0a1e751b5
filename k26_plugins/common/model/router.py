"""Route tokens to experts and weight the experts (docs/model.md, 3.3: `noaux_tc` with one group)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def router_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the router's logits, float32 `[num_tokens, num_experts]`, for hidden_states `[num_tokens, hidden_size]`.

    weight: `[num_experts, hidden_size]`. Products of bfloat16 are exact in float32, so a GPU that sums them in float32
    need not convert its operands.
    """
    if hidden_states.is_cuda and hidden_states.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(hidden_states, weight.T, out_dtype=torch.float32)
    return F.linear(hidden_states.float(), weight.float())


def route(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, scaling: float, *, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts for each token, and weight them.

    logits: float32 `[num_tokens, num_experts]`. bias: float32 `[num_experts]`; it affects which experts are chosen, not
    their weights. Returns topk_weights float32 and topk_ids int64, both `[num_tokens, top_k]`. With `normalize`, the
    weights of a token sum to `scaling`.
    """
    scores = torch.sigmoid(logits.float())
    topk_ids = torch.topk(scores + bias.float(), top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_weights * scaling, topk_ids
