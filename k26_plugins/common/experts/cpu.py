"""Compute INT4 experts on a CPU, exact to bfloat16: by torch's INT4 GEMM for few tokens, by a dense GEMM for many.

torch's `_weight_int4pack_mm_for_cpu` streams the packed weights at the memory's bandwidth and keeps the activations in
bfloat16, but its arithmetic rate stays at that of one small tile. If many tokens share an expert, the expert's weights
are dequantized from the same packed bytes, a cache-sized tile at a time, and multiplied by the dense GEMM.
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

# Tokens of one expert from which the dense GEMM is faster than the INT4 GEMM. The INT4 and the dense GEMM took, for w13
# of 4096 × 7168 on 2 cores of an AMD EPYC (Zen 4, AVX512-BF16), 11.4 and 13 ms for 32 tokens, 23 and 18 ms for 64
# tokens, 90 and 47 ms for 256 tokens. On 2 cores of an AMD EPYC (Zen 3, AVX2), where the dense GEMM is in float32, they
# took 58 and 49 ms for 64 tokens, 273 and 163 ms for 256 tokens.
DENSE_FROM = 48
# Rows that are dequantized at a time. Their dense copy (3.7 MB in bfloat16 at 7168 inputs) stays in a last-level cache.
TILE_ROWS = 256


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """A layout of INT4 weights for torch's CPU GEMM: blocks of `block` rows, with the inputs outermost within a block.

    A byte holds the same input of two rows, which lie half a block apart (`interleaved` False) or side by side (True).
    Which layout torch uses depends on the instruction set that it found.
    """

    block: int
    interleaved: bool

    def pack(self, packed: torch.Tensor) -> torch.Tensor:
        """Return uint8 `[N / block, K, block / 2]` for the checkpoint's int32 `[N, K / 8]`."""
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
        """Return int32 `[E, N, K / 8]` for the packed bytes of E experts with N = `rows`, as the inverse of `pack`.

        stored: a tensor `[E, …]` of any dtype that holds these bytes.
        """
        blocks = stored.contiguous().view(torch.uint8).reshape(len(stored), rows // self.block, -1, self.block // 2)
        pairs = blocks.transpose(2, 3).unflatten(-1, (-1, 2))  # [E, blocks, block / 2, K / 2, (even, odd)]
        low = (pairs[..., 0] & 0xF) | (pairs[..., 1] << 4)
        high = (pairs[..., 0] >> 4) | (pairs[..., 1] & 0xF0)
        halves = torch.stack((low, high), dim=3) if self.interleaved else torch.cat((low, high), dim=2)
        return halves.reshape(len(stored), rows, -1).view(torch.int32)

    def dequantize(self, tile: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return weights `[blocks, K, block]` in the dtype of `scale`.

        tile: uint8 `[blocks, K, block / 2]`. scale: bfloat16 or float32 `[blocks, K / 32, block]`.
        """
        low, high = tile & 0xF, tile >> 4
        nibbles = torch.stack((low, high), -1).flatten(-2) if self.interleaved else torch.cat((low, high), -1)
        # uint8 wraps below zero, so that the bytes are the two's complement of u − 8.
        q = nibbles.sub_(8).view(torch.int8).to(scale.dtype)
        weights: torch.Tensor = q.unflatten(1, (-1, GROUP_SIZE)).mul_(scale.unsqueeze(2)).flatten(1, 2)
        return weights


@cache
def packed_layout() -> PackedLayout | None:
    """Return the layout that this process' torch uses, found by packing a probe; None if it is not a known layout."""
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
        """packed: int32 in the checkpoint's shape `[E, N, K / 8]`, its bytes in `layout`; it is not copied.

        scale_and_zero: bfloat16 `[E, K / 32, N, 2]`.
        """
        self.rows, self.inputs = packed.shape[1], packed.shape[2] * PACK_FACTOR
        self.packed, self.scale_and_zero, self.layout = packed, scale_and_zero, layout

    @classmethod
    def repack(cls, packed: torch.Tensor, scale: torch.Tensor, layout: PackedLayout) -> Self:
        """Return the matrix of a checkpoint's tensors.

        packed: int32 `[E, N, K / 8]`, repacked in its own storage. scale: bfloat16 `[E, N, K / 32]`, copied.
        """
        for matrix in packed:
            matrix.view(torch.uint8).view(-1).copy_(layout.pack(matrix).view(-1))
        # torch wants a zero point beside each scale; its convention is (u − 8) · scale + zero.
        num_experts, rows, groups = scale.shape
        scale_and_zero = torch.zeros(num_experts, groups, rows, 2, dtype=torch.bfloat16)
        scale_and_zero[..., 0] = scale.transpose(1, 2)
        return cls(packed, scale_and_zero, layout)

    def restore(self, packed: torch.Tensor, scale_and_zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the checkpoint's packed weights, int32 `[E, N, K / 8]`, and scales, bfloat16 `[E, N, K / 32]`.

        packed: int32 `[E, N, K / 8]`, bytes in the layout. scale_and_zero: bfloat16 `[E, K / 32, N, 2]`. Both hold the
        same E experts, which may be any of the matrix's.
        """
        return self.layout.unpack(packed, self.rows), scale_and_zero[..., 0].transpose(1, 2)

    def gemm(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return x · Wᵀ, bfloat16 `[tokens, N]`, for x bfloat16 `[tokens, K]`."""
        packed = self.packed[expert].view(torch.uint8).view(self.rows, self.inputs // 2)
        if x.shape[0] < DENSE_FROM:
            return torch._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, self.scale_and_zero[expert])
        return self._dense_gemm(expert, x, packed)

    def _dense_gemm(self, expert: int, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        # On 2 cores of the Zen 3 named above, 512 rows are multiplied at 114 GFLOP/s in float32 and at 3 in bfloat16.
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
    """Experts computed by torch's operators on a CPU, with bfloat16 activations and INT4 weights.

    They run on any x86 CPU with AVX2 or AVX512, and slowly on any other CPU.
    """

    name = "cpu"
    device_type = "cpu"

    def __init__(self, w13: Int4Matrix, w2: Int4Matrix) -> None:
        super().__init__(LayerSizes(len(w13.packed), w13.inputs, w2.inputs, w13.packed.device))
        self.w13 = w13
        self.w2 = w2

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """Return why torch's INT4 GEMM cannot be used, or None if it can.

        torch must pack INT4 in a layout that is known here, and the numbers of rows must be multiples of its blocks.
        """
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
        """Take over matrices that are in the operator's layout, in the shapes and dtypes of `tensors()`."""
        layout = packed_layout()
        assert layout is not None, "they were repacked in this layout"
        return cls(
            Int4Matrix(tensors["w13_packed"], tensors["w13_scale"], layout),
            Int4Matrix(tensors["w2_packed"], tensors["w2_scale"], layout),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the operator's packed weights, int32, and the scales with a zero point beside each, bfloat16.

        The shapes are `[E, 2 I, H / 8]` and `[E, H / 32, 2 I, 2]` for w13, `[E, H, I / 8]` and `[E, I / 32, H, 2]` for
        w2.
        """
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
        """Compute one expert after the other by two GEMMs.

        Activations are bfloat16, the only dtype that torch's INT4 GEMM takes on every CPU at full speed.
        """
        weights = batch.topk_weights.flatten()
        total = torch.zeros(batch.hidden_states.shape, dtype=torch.float32)
        for expert, pairs in tokens_by_expert(batch.topk_ids, batch.expert_map, self.sizes.num_experts):
            tokens = pairs // batch.topk_ids.shape[1]
            gate, up = self.w13.gemm(expert, batch.hidden_states[tokens]).float().chunk(2, dim=-1)
            y = self.w2.gemm(expert, (F.silu(gate) * up).to(torch.bfloat16))
            total.index_add_(0, tokens, y * weights[pairs].unsqueeze(-1))
        batch.out.copy_(total)
