"""What the fused experts are measured against: a peer takes the checkpoint's tensors and gives a function, or says why not.

vLLM's names are those of 0.32, read in its source; no peer has been run here yet (see results/README.md).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from k26_kernels import dequantise, device_of, repack

# hidden_states, topk_weights, topk_ids, expert_map → the routed sum.
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class NotHereError(Exception):
    """A peer that cannot run on this machine; the message is its row in the table."""


@dataclass(frozen=True)
class Weights:
    """A layer as the checkpoint packs it, `[E, N, K / 8]` int32 and `[E, N, K / 32]` bfloat16."""

    w13_packed: torch.Tensor
    w13_scale: torch.Tensor
    w2_packed: torch.Tensor
    w2_scale: torch.Tensor

    @classmethod
    def random(cls, num_experts: int, hidden: int, inner: int, device: torch.device) -> Weights:
        """Any bits are weights; scales are such that a unit activation gives a unit output."""
        generator = torch.Generator(device).manual_seed(0)

        def matrix(rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (num_experts, rows, inputs // 8)
            packed = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, device=device, dtype=torch.int32)
            scale = torch.rand(num_experts, rows, inputs // 32, generator=generator, device=device) + 0.5
            return packed, (scale / (4.6 * inputs**0.5)).to(torch.bfloat16)

        return cls(*matrix(2 * inner, hidden), *matrix(hidden, inner))


def require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise NotHereError(f"{module} is not installed")


def vllm_marlin(weights: Weights) -> Run:
    require("vllm")
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales
    from vllm.scalar_type import scalar_types

    def matrix(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, inputs = packed.shape[1], packed.shape[2] * 8
        repacked = ops.gptq_marlin_moe_repack(packed.transpose(1, 2).contiguous(), inputs, rows, 4)
        return repacked, marlin_moe_permute_scales(scale.transpose(1, 2).contiguous(), inputs, rows, 32)

    w1, w1_scale = matrix(weights.w13_packed, weights.w13_scale)
    w2, w2_scale = matrix(weights.w2_packed, weights.w2_scale)

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        return fused_marlin_moe(
            x,
            w1,
            w2,
            None,
            None,
            w1_scale,
            w2_scale,
            topk_weights,
            ids,
            quant_type_id=scalar_types.uint4b8.id,
            global_num_experts=len(w1) if expert_map is None else len(expert_map),
            expert_map=expert_map,
        )

    return run


def vllm_triton(weights: Weights) -> Run:
    require("vllm")
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    config = int4_w4a16_moe_quant_config(weights.w13_scale, weights.w2_scale, block_shape=[0, 32])
    w1, w2 = weights.w13_packed.view(torch.uint8), weights.w2_packed.view(torch.uint8)

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        experts = len(w1) if expert_map is None else len(expert_map)
        return fused_experts(
            x, w1, w2, topk_weights, ids, global_num_experts=experts, expert_map=expert_map, quant_config=config
        )

    return run


def dequantise_and_dense(weights: Weights) -> Run:
    """Each expert with tokens dequantised by our kernel, then cuBLAS. Waits for the device to know which."""
    copy = Weights(*(getattr(weights, name).clone() for name in ("w13_packed", "w13_scale", "w2_packed", "w2_scale")))
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
            w13 = dequantise(copy.w13_packed, copy.w13_scale, one, gated=True)[0]
            w2 = dequantise(copy.w2_packed, copy.w2_scale, one, gated=False)[0]
            gate, up = (x[tokens] @ w13.T).chunk(2, dim=-1)
            out.index_add_(0, tokens, (F.silu(gate) * up) @ w2.T * topk_weights[tokens, place, None])
        return out.to(x.dtype)

    return run


def without_adapter(module: str) -> Callable[[Weights], Run]:
    def prepare(weights: Weights) -> Run:
        require(module)
        raise NotHereError(f"{module} is installed, but this benchmark has no adapter for it yet")

    return prepare


PEERS: dict[str, Callable[[Weights], Run]] = {
    "vLLM Marlin MoE": vllm_marlin,
    "vLLM Triton WNA16": vllm_triton,
    "Humming": without_adapter("humming"),
    "FlashInfer MxInt4": without_adapter("flashinfer"),
    "dequantise + cuBLAS": dequantise_and_dense,
}

# It cannot be captured in a CUDA graph.
WAITS_FOR_DEVICE = "dequantise + cuBLAS"
