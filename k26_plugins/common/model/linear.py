"""The linear layer of the reference model.

It gives the same results on every CPU, up to the order of the sums, and is not slow on CPUs without bfloat16
instructions.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `[..., N]` for x `[..., K]` and weight `[N, K]`, in their dtype.

    On a CPU without vector instructions for bfloat16, float32 copies are multiplied and the result is rounded: products
    of bfloat16 are exact in float32, so that only the order of the sums differs. PyTorch's own GEMM takes 8 to 14 times
    as long there (AMD EPYC Milan, one core: 344 × 7168 × 1536 in 692 ms against 124 ms), except for a single row.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > x.shape[-1] and not multiplies_bfloat16():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., out_features]` for x `[..., in_features]`, in the dtype of x and the weight."""
        return linear(x, self.weight, self.bias)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this CPU has vector instructions for bfloat16 products.

    Without them, PyTorch is faster in float32.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
