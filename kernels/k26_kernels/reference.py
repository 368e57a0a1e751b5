"""Compute the routed sum in plain PyTorch from weights in the kernels' layout, to compare with what a call computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from k26_kernels.experts import KernelExperts
from k26_kernels.layout import GROUP_SIZE, restore


def dequantize_reference(
    packed: torch.Tensor, scale: torch.Tensor, fragment: str, dtype: torch.dtype = torch.bfloat16, *, gated: bool
) -> torch.Tensor:
    """Return the matrices of all experts, `[E, N, K]` in `dtype`, dequantized from copies of the stored tensors.

    packed: int32 `[E, N, K / 8]`. scale: bfloat16 `[E, N, K / 32]`. fragment, gated: as for `repack`.
    """
    packed, scale = packed.clone(), scale.clone()
    restore(packed, scale, fragment, gated=gated)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    q = ((packed.unsqueeze(-1) >> shifts) & 0xF).flatten(-2) - 8
    return (q * scale.float().repeat_interleave(GROUP_SIZE, dim=-1)).to(dtype)


def fused_experts_reference(
    hidden_states: torch.Tensor,
    experts: KernelExperts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the routed sum, float32 `[num_tokens, hidden_size]`; arguments are those of `fused_experts`.

    Every expert is dequantized, so this is for small experts.
    """
    fragment = experts.device.target.fragment
    w13 = dequantize_reference(experts.w13_packed, experts.w13_scale, fragment, torch.float32, gated=True)
    w2 = dequantize_reference(experts.w2_packed, experts.w2_scale, fragment, torch.float32, gated=False)
    x, out = hidden_states.float(), torch.zeros_like(hidden_states, dtype=torch.float32)
    for token, chosen in enumerate(topk_ids.tolist()):
        for k, expert in enumerate(chosen):
            if expert_map is not None:
                expert = int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1
            if 0 <= expert < experts.shape.num_experts:
                gate, up = (w13[expert] @ x[token]).chunk(2)
                out[token] += topk_weights[token, k] * (w2[expert] @ (F.silu(gate) * up))
    return out


def batched_experts_reference(
    hidden_states: torch.Tensor, experts: KernelExperts, counts: torch.Tensor
) -> torch.Tensor:
    """Return each expert's results, float32 `[num_experts, max_tokens, hidden_size]`, zero where a buffer has no token.

    Arguments are those of `batched_experts`.
    """
    num_experts, max_tokens, hidden_size = hidden_states.shape
    is_there = torch.arange(max_tokens, device=counts.device) < counts[:, None]
    topk_ids = torch.where(is_there, torch.arange(num_experts, device=counts.device)[:, None], -1).reshape(-1, 1)
    x, weights = hidden_states.reshape(-1, hidden_size), torch.ones_like(topk_ids, dtype=torch.float32)
    return fused_experts_reference(x, experts, topk_ids, weights).view(hidden_states.shape)
