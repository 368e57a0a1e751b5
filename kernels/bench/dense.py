"""A peer that no engine has: each expert is dequantized by our kernel, and a dense GEMM follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench.dequantize import dequantize
from k26_kernels import device_of, repack

from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.peer import Run

# The name of this peer, which cannot be captured in a CUDA graph because it waits for the device.
WAITS_FOR_DEVICE = "dequantize + cuBLAS"


def dequantize_and_dense(weights: ExpertWeights) -> Run:
    """Return the function that dequantizes each expert that has tokens by our kernel, and multiplies by cuBLAS.

    It waits for the device to learn which experts have tokens.
    """
    copy = weights.copy_of(list(range(weights.num_experts)))
    fragment = device_of(copy.w13_packed.device).target.fragment
    repack(copy.w13_packed, copy.w13_scale, fragment, gated=True)
    repack(copy.w2_packed, copy.w2_scale, fragment, gated=False)
    number = torch.arange(len(copy.w13_packed), device=copy.w13_packed.device)

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        local = ids.long() if expert_map is None else expert_map[ids.long()].long()
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in local[local >= 0].unique().tolist():
            tokens, place = torch.where(local == expert)
            one = number[expert : expert + 1]
            w13 = dequantize(copy.w13_packed, copy.w13_scale, one, gated=True)[0]
            w2 = dequantize(copy.w2_packed, copy.w2_scale, one, gated=False)[0]
            gate, up = (x[tokens] @ w13.T).chunk(2, dim=-1)
            out.index_add_(0, tokens, (F.silu(gate) * up) @ w2.T * topk_weights[tokens, place, None])
        return out.to(x.dtype)

    return run
