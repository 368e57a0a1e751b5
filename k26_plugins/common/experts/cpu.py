"""INT4 experts on a CPU, exact to bfloat16: torch's INT4 GEMM for few tokens, a dense GEMM for many.

torch's `_weight_int4pack_mm_for_cpu` streams the packed weights at the memory's bandwidth and keeps the activations in
bfloat16, but its arithmetic rate stays at that of one small tile. Where many tokens share an expert its weights are
dequantized, from the same packed bytes and a cache-sized tile at a time, and multiplied by the dense GEMM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
import torch.nn.functional as F

from k26_plugins.common.experts.base import (
    ExpertsBackend,
    ExpertWeights,
    LayerSizes,
    RoutedBatch,
    Sizes,
    tokens_by_expert,
)
from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR
from k26_plugins.common.model.linear import multiplies_bfloat16

# Tokens of one expert from which the dense GEMM wins. On 2 cores of an AMD EPYC (Zen 4, AVX512-BF16), w13 of
# 4096 × 7168: 32 tokens 11.4 ms against 13 ms, 64 tokens 23 ms against 18 ms, 256 tokens 90 ms against 47 ms. In float32
# on 2 cores of an AMD EPYC (Zen 3, AVX2): 64 tokens 58 ms against 49 ms, 256 tokens 273 ms against 163 ms.
DENSE_FROM = 48
# Rows dequantized at a time. Their copy (3.7 MB in bfloat16 at 7168 inputs) stays in a last-level cache.
TILE_ROWS = 256


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How torch lays INT4 weights out for its CPU GEMM: blocks of rows, inputs outermost within a block.

    A byte holds the same input of two rows: halves of the block (`interleaved` False) or neighbours (True). Which one
    depends on the instruction set that torch found.
    """

    block: int
    interleaved: bool

    def pack(self, packed: torch.Tensor) -> torch.Tensor:
        """Bytes `[N / block, K, block / 2]` from the checkpoint's int32 `[N, K / 8]`."""
        rows = packed.shape[0]
        source = packed.contiguous().view(torch.uint8).view(rows // self.block, self.block, -1)
        if self.interleaved:
            low, high = source[:, 0::2], source[:, 1::2]
        else:
            low, high = source.chunk(2, dim=1)
        even = (low & 0xF) | (high << 4)
        odd = (low >> 4) | (high & 0xF0)
        return torch.stack((even, odd), dim=-1).flatten(-2).transpose(1, 2).contiguous()

    def unpack(self, stored: torch.Tensor, rows: int) -> torch.Tensor:
        """The inverse of `pack`: int32 `[E, N, K / 8]` from the bytes of each expert."""
        blocks = stored.contiguous().view(torch.uint8).reshape(len(stored), rows // self.block, -1, self.block // 2)
        pairs = blocks.transpose(2, 3).unflatten(-1, (-1, 2))  # [E, blocks, block / 2, K / 2, (even, odd)]
        low = (pairs[..., 0] & 0xF) | (pairs[..., 1] << 4)
        high = (pairs[..., 0] >> 4) | (pairs[..., 1] & 0xF0)
        halves = torch.stack((low, high), dim=3) if self.interleaved else torch.cat((low, high), dim=2)
        return halves.reshape(len(stored), rows, -1).view(torch.int32)

    def dequantize(self, tile: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`[blocks, K, block]`, in the dtype of `scale` `[blocks, K / 32, block]`, from bytes `[blocks, K, block / 2]`."""
        low, high = tile & 0xF, tile >> 4
        nibbles = torch.stack((low, high), -1).flatten(-2) if self.interleaved else torch.cat((low, high), -1)
        # Wraps below zero, as the two's complement of u − 8 does.
        q = nibbles.sub_(8).view(torch.int8).to(scale.dtype)
        weights: torch.Tensor = q.unflatten(1, (-1, GROUP_SIZE)).mul_(scale.unsqueeze(2)).flatten(1, 2)
        return weights


@cache
def packed_layout() -> PackedLayout | None:
    """The layout of this process' torch, found by packing a probe; None where it is none that is known."""
    u = torch.randint(0, 16, (128, 2 * GROUP_SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    expected = torch._convert_weight_to_int4pack_for_cpu(u, 1).flatten()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = (u.unflatten(-1, (-1, PACK_FACTOR)) << shifts).sum(-1, dtype=torch.int32)
    for layout in (PackedLayout(64, False), PackedLayout(32, False), PackedLayout(32, True)):
        if torch.equal(layout.pack(packed).flatten(), expected):
            return layout
    return None


class Int4Matrix:
    """One projection of every expert, `[E, N, K]`, in torch's packed layout."""

    def __init__(self, packed: torch.Tensor, scale_and_zero: torch.Tensor, layout: PackedLayout) -> None:
        """packed: repacked, in the checkpoint's shape. scale_and_zero: bfloat16 `[E, K / 32, N, 2]`."""
        self.rows, self.inputs = packed.shape[1], packed.shape[2] * PACK_FACTOR
        self.packed, self.scale_and_zero, self.layout = packed, scale_and_zero, layout

    @classmethod
    def repack(cls, packed: torch.Tensor, scale: torch.Tensor, layout: PackedLayout) -> Self:
        """`packed` int32 `[E, N, K / 8]` is repacked in its own storage, `scale` bfloat16 `[E, N, K / 32]` is copied."""
        for matrix in packed:
            matrix.view(torch.uint8).view(-1).copy_(layout.pack(matrix).view(-1))
        # torch wants a zero point beside each scale; its convention is (u − 8) · scale + zero.
        num_experts, rows, groups = scale.shape
        scale_and_zero = torch.zeros(num_experts, groups, rows, 2, dtype=torch.bfloat16)
        scale_and_zero[..., 0] = scale.transpose(1, 2)
        return cls(packed, scale_and_zero, layout)

    def restore(self, packed: torch.Tensor, scale_and_zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The checkpoint's tensors of some experts' `packed` and `scale_and_zero`."""
        return self.layout.unpack(packed, self.rows), scale_and_zero[..., 0].transpose(1, 2)

    def gemm(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x · Wᵀ, bfloat16 `[tokens, N]`, for x bfloat16 `[tokens, K]`."""
        packed = self.packed[expert].view(torch.uint8).view(self.rows, self.inputs // 2)
        if x.shape[0] < DENSE_FROM:
            return torch._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, self.scale_and_zero[expert])
        return self._dense_gemm(expert, x, packed)

    def _dense_gemm(self, expert: int, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        # 2 cores of that Zen 3 multiply 512 rows at 114 GFLOP/s in float32, and at 3 in bfloat16.
        dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
        factor = x.to(dtype)
        block = self.layout.block
        blocks = packed.view(-1, self.inputs, block // 2)
        scale = self.scale_and_zero[expert, :, :, 0].unflatten(1, (-1, block)).transpose(0, 1).to(dtype).contiguous()
        out = x.new_empty(x.shape[0], self.rows // block, block)
        step = max(1, TILE_ROWS // block)
        for start in range(0, len(blocks), step):
            tile = self.layout.dequantize(blocks[start : start + step], scale[start : start + step])
            out[:, start : start + step] = torch.matmul(factor, tile).transpose(0, 1)
        return out.flatten(1)


class CpuExperts(ExpertsBackend):
    """bfloat16 activations, INT4 weights, any x86 CPU with AVX2 or AVX512 and slowly any other."""

    name = "cpu"
    device_type = "cpu"

    def __init__(self, w13: Int4Matrix, w2: Int4Matrix) -> None:
        super().__init__(LayerSizes(len(w13.packed), w13.inputs, w2.inputs, w13.packed.device))
        self.w13 = w13
        self.w2 = w2

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """It takes CPUs on which torch packs INT4 in a known layout, and sizes that this layout divides."""
        if weights.device.type != "cpu":
            return f"the weights are on {weights.device}"
        layout = packed_layout()
        if layout is None:
            return "this torch lays INT4 weights out in a way that is not known"
        for name, rows in (("hidden size", weights.hidden_size), ("gate and up rows", 2 * weights.intermediate_size)):
            if rows % layout.block:
                return f"{name} of {rows} is no multiple of {layout.block}"
        return None

    @classmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Repack into the layout of torch's own operator for INT4 GEMMs."""
        layout = packed_layout()
        assert layout is not None, "load follows unsupported"
        return cls(
            Int4Matrix.repack(weights.w13_packed, weights.w13_scale, layout),
            Int4Matrix.repack(weights.w2_packed, weights.w2_scale, layout),
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Take over matrices that are in the operator's layout."""
        layout = packed_layout()
        assert layout is not None, "they were repacked in this layout"
        return cls(
            Int4Matrix(tensors["w13_packed"], tensors["w13_scale"], layout),
            Int4Matrix(tensors["w2_packed"], tensors["w2_scale"], layout),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The operator's packed weights, with scales and zero points side by side."""
        return {
            "w13_packed": self.w13.packed,
            "w13_scale": self.w13.scale_and_zero,
            "w2_packed": self.w2.packed,
            "w2_scale": self.w2.scale_and_zero,
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """Unpack the operator's layout."""
        return ExpertWeights(
            *self.w13.restore(tensors["w13_packed"], tensors["w13_scale"]),
            *self.w2.restore(tensors["w2_packed"], tensors["w2_scale"]),
        )

    def _forward(self, batch: RoutedBatch) -> None:
        """Compute one expert after the other, each by two of torch's INT4 GEMMs.

        They are in bfloat16, the only dtype that torch's GEMM takes on every CPU at full speed.
        """
        weights = batch.topk_weights.flatten()
        total = torch.zeros(batch.hidden_states.shape, dtype=torch.float32)
        for expert, pairs in tokens_by_expert(batch.topk_ids, batch.expert_map, self.sizes.num_experts):
            tokens = pairs // batch.topk_ids.shape[1]
            gate, up = self.w13.gemm(expert, batch.hidden_states[tokens]).float().chunk(2, dim=-1)
            y = self.w2.gemm(expert, (F.silu(gate) * up).to(torch.bfloat16))
            total.index_add_(0, tokens, y * weights[pairs].unsqueeze(-1))
        batch.out.copy_(total)
