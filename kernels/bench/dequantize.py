"""Dequantize stored INT4 weights to dense matrices for a dense GEMM; the experts' kernels never write such matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from k26_kernels.layout import PACK_FACTOR, ROWS, check_sizes
from k26_kernels.target import device_of
from k26_kernels.unpack import load_scales, load_words, weights_tile


@triton.jit
def dequantize_kernel(
    packed: tl.tensor, scale: tl.tensor, experts: tl.tensor, out: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, FRAGMENT: tl.constexpr,
) -> None:  # fmt: skip
    """Dequantize one tile in each program, and write its rows in the checkpoint's order.

    The three program ids are a block of rows, a block of inputs, and an index in `experts`.
    """
    rows_first = tl.program_id(0) * BLOCK_SIZE_N
    k = tl.program_id(1) * BLOCK_SIZE_K
    index = tl.program_id(2)
    expert = tl.load(experts + index).to(tl.int64)
    words = load_words(packed + expert * (N * K // 8), rows_first, k, K, BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT)
    scales = load_scales(scale + expert * (N * K // 32), rows_first, k, K, BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT)
    tile = weights_tile(words, scales, BLOCK_SIZE_N, BLOCK_SIZE_K, FRAGMENT, False, out.dtype.element_ty)
    row = rows_first + tl.arange(0, BLOCK_SIZE_N)
    if GATED:
        row = row % 16 // 8 * (N // 2) + row // 16 * 8 + row % 8
    tl.store(out + index.to(tl.int64) * (N * K) + row[:, None] * K + (k + tl.arange(0, BLOCK_SIZE_K))[None, :], tile)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    experts: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gated: bool,
) -> torch.Tensor:
    """Return the matrices of some experts: `[len(experts), N, K]` in bfloat16 or float16, rows as in the checkpoint.

    packed, scale: as `layout.repack` leaves them. experts: integers `[n]`, on the device, each from 0 to E − 1. gated:
    whether the matrices are w13, whose rows of gate and up are stored interleaved. Raises ValueError for another dtype,
    and for sizes that the kernels do not support.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"weights are dequantized to torch.bfloat16 or torch.float16, not to {dtype}.")
    out_features, in_features = packed.shape[1], packed.shape[2] * PACK_FACTOR
    check_sizes(out_features, in_features)
    out = torch.empty(len(experts), out_features, in_features, dtype=dtype, device=packed.device)
    target = device_of(packed.device).target
    block_size = 128
    if len(experts):
        dequantize_kernel[(out_features // ROWS, in_features // block_size, len(experts))](
            packed, scale, experts, out, N=out_features, K=in_features, GATED=gated,
            BLOCK_SIZE_N=ROWS, BLOCK_SIZE_K=block_size, FRAGMENT=target.fragment, num_warps=4,
        )  # fmt: skip
    return out
