"""Triton's interpreter gets bfloat16 wrong in two ways, which is why `dot_operand` and `rounded` exist."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from k26_kernels.unpack import INTERPRETED, dot_operand, rounded


@triton.jit
def matmul(x: tl.tensor, y: tl.tensor, out: tl.tensor, MENDED: tl.constexpr) -> None:  # noqa: N803
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(x + i * 16 + j), tl.load(y + i * 16 + j)
    if MENDED:
        a, b = dot_operand(a), dot_operand(b)
    tl.store(out + i * 16 + j, tl.dot(a, b))


@triton.jit
def cast(x: tl.tensor, out: tl.tensor, MENDED: tl.constexpr) -> None:  # noqa: N803
    i = tl.arange(0, 256)
    value = tl.load(x + i)
    tl.store(out + i, rounded(value, tl.bfloat16) if MENDED else value.to(tl.bfloat16))


@pytest.mark.parametrize("mended", [True, False])
def test_products_of_bfloat16(device: torch.device, mended: bool) -> None:
    if not mended and not INTERPRETED.value:
        pytest.skip("a GPU multiplies bfloat16 rightly")
    x, y = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device) for seed in (0, 1))
    out = torch.empty(16, 16, device=device)
    matmul[(1,)](x, y, out, MENDED=mended)
    right = torch.allclose(out, x.float() @ y.float(), atol=1e-4)
    assert right == mended, "the interpreter's tl.dot has changed: is dot_operand still needed?"


@pytest.mark.parametrize("mended", [True, False])
def test_rounding_to_bfloat16(device: torch.device, mended: bool) -> None:
    if not mended and not INTERPRETED.value:
        pytest.skip("a GPU rounds rightly")
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)).to(device)
    # Two ties, of which one is rounded down to even and one up, and a value whose rounding carries into the exponent.
    x[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1.99999]).to(device)
    out = torch.empty(256, dtype=torch.bfloat16, device=device)
    cast[(1,)](x, out, MENDED=mended)
    assert torch.equal(out, x.bfloat16()) == mended, "the interpreter's cast has changed: is `rounded` still needed?"
