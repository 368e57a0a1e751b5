"""The GEMM with a weight in the reference: the same numbers on every CPU, and nowhere at a crawl."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[..., N]` of x `[..., K]` and weight `[N, K]`, in their dtype.

    A CPU without vector instructions for bfloat16 multiplies float32 copies and rounds the result: products of bfloat16 are
    exact in float32, so that only the order of the sums is another. PyTorch's own GEMM takes 8 to 14 times as long there
    (AMD EPYC Milan, one core: 344 × 7168 × 1536 in 692 ms against 124 ms), except that of a single row.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > x.shape[-1] and not multiplies_bfloat16():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`linear` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[..., in_features]`; returns `[..., out_features]`."""
        return linear(x, self.weight, self.bias)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has vector instructions for products of bfloat16: elsewhere PyTorch is faster in float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
