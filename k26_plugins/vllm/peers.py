"""Provides vLLM's kernels for INT4 experts, made from the checkpoint's tensors, for `k26 tune`.

No server imports this module. If a release lacks a name that a kernel needs, the kernel's row in the table of `k26 tune`
says so. The names that the kernels need were read in the source of vLLM 0.32, of Humming 0.1.19 and of FlashInfer as vLLM
0.32 uses it, and tests/vllm/test_peers.py checks them. None of the kernels has been run yet.
"""

from __future__ import annotations

from typing import Any

import torch

from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.peer import NotHereError, Peer, Run, asking_for, require


def vllm_marlin(weights: ExpertWeights) -> Run:
    """Return vLLM's Marlin kernel for MoE layers with these weights. Raises NotHereError without vLLM."""
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


def vllm_triton(weights: ExpertWeights) -> Run:
    """Return vLLM's Triton kernel for INT4 weights with these weights. Raises NotHereError without vLLM."""
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


def humming(weights: ExpertWeights) -> Run:
    """Return Humming's two GEMMs with these weights, put together as vLLM does, with vLLM's alignment, SwiGLU and sum.

    Raises NotHereError without Humming or vLLM.
    """
    require("humming")
    require("vllm")
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum

    experts = len(weights.w13_packed)
    device = weights.w13_packed.device
    compute = {"gemm_type": "indexed", "use_batch_invariant": False, "use_f16_accum": False}

    def matrix(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.nn.Module, list[Any]]:
        scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "num_bits": 4}
        layer = HummingLayer(
            shape_n=packed.shape[1],
            shape_k=packed.shape[2] * 8,
            weight_config={**scheme, "strategy": "group", "group_size": 32, "symmetric": True},
            num_experts=experts,
            torch_dtype=torch.bfloat16,
        ).to(device)
        layer.load_from_tensors({"weight_packed": packed, "weight_scale": scale})
        layer.transform()
        return layer, get_heuristics_config(layer.humming_config, gemm_type="indexed", device=device)

    def block_size(tuning: list[Any], slots: int) -> int:
        return next((tile["block_shape"][0] for above, upto, tile in tuning if above < slots <= upto), 64)

    w13, w13_tuning = matrix(weights.w13_packed, weights.w13_scale)
    w2, w2_tuning = matrix(weights.w2_packed, weights.w2_scale)

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        num_global, top_k = experts if expert_map is None else len(expert_map), ids.shape[1]
        slots = -(-ids.numel() * experts // num_global)

        def product(layer: torch.nn.Module, tuning: list[Any], inputs: torch.Tensor, each: int) -> torch.Tensor:
            size = block_size(tuning, slots)
            order = moe_align_block_size(ids, size, num_global, expert_map, ignore_invalid_experts=True)
            return layer(
                inputs,
                sorted_ids=order[0],
                expert_ids=order[1],
                num_tokens_padded=order[2],
                top_k=each,
                valid_shape_m=slots,
                compute_config=compute,
                tuning_config=tuning,
            )

        both = product(w13, w13_tuning, x, top_k)
        activated = torch.empty(len(both), both.shape[1] // 2, dtype=x.dtype, device=x.device)
        torch.ops._C.silu_and_mul(activated, both)
        outputs = product(w2, w2_tuning, activated, 1).view(len(x), top_k, -1)
        return moe_fused_mul_sum(outputs, topk_weights, topk_ids=ids, expert_map=expert_map)

    return run


def flashinfer_mxint4(weights: ExpertWeights) -> Run:
    """Return FlashInfer's MXINT4 experts, as vLLM calls them, with these weights.

    The kernel chooses the experts itself, so it gets logits by which it chooses those of the batch. Raises NotHereError
    without FlashInfer or vLLM, and on GPUs other than sm_100.
    """
    require("flashinfer")
    require("vllm")
    if torch.cuda.get_device_capability()[0] != 10:
        raise NotHereError("its MXINT4 experts are for sm_100")
    from flashinfer import RoutingMethodType
    from vllm.model_executor.layers.quantization.utils.flashinfer_mxint4_moe import (
        flashinfer_trtllm_mxint4_moe,
        prepare_static_weights_for_trtllm_mxint4_moe,
    )

    experts, inner = len(weights.w13_packed), weights.w13_packed.shape[1] // 2
    prepared = prepare_static_weights_for_trtllm_mxint4_moe(
        weights.w13_packed.clone(), weights.w13_scale, weights.w2_packed.clone(), weights.w2_scale
    )

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        num_global = experts if expert_map is None else len(expert_map)
        out = flashinfer_trtllm_mxint4_moe(
            x=x,
            router_logits=asking_for(ids, topk_weights, num_global),
            w13_weight_packed=prepared["gemm1_weights"],
            w13_weight_scale=prepared["gemm1_scales"],
            w2_weight_packed=prepared["gemm2_weights"],
            w2_weight_scale=prepared["gemm2_scales"],
            global_num_experts=num_global,
            top_k=ids.shape[1],
            intermediate_size_per_partition=inner,
            local_num_experts=experts,
            e_score_correction_bias=torch.zeros(num_global, device=x.device),
            routing_method_type=RoutingMethodType.DeepSeekV3,
        )
        return out * topk_weights.sum(-1, keepdim=True).to(out.dtype)

    return run


PEERS: dict[str, Peer] = {
    "vLLM Marlin MoE": vllm_marlin,
    "vLLM Triton WNA16": vllm_triton,
    "Humming": humming,
    "FlashInfer MxInt4": flashinfer_mxint4,
}
