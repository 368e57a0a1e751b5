"""Provides SGLang's kernels for INT4 experts, made from the checkpoint's tensors, for `k26 tune`.

No server imports this module. If a release lacks a name that a kernel needs, the kernel's row in the table of `k26 tune`
says so. The names that the kernels need were read in the source of SGLang 0.5.23, and tests/sglang/test_peers.py checks
them. None of the kernels has been run yet.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.peer import NotHereError, Peer, Run, asking_for, require


@cache
def one_rank(device: torch.device) -> None:
    """Set up what SGLang's kernels read of a server: default settings, and groups of a single rank."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    # With this name SGLang leaves the settings as they are, because it has no model's configuration to read.
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))
    if not torch.distributed.is_initialized():
        store = Path(tempfile.mkdtemp(prefix="k26-tune-")) / "store"
        init_distributed_environment(1, 0, f"file://{store}", 0, "nccl" if device.type == "cuda" else "gloo")
        initialize_model_parallel()


def local(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Return the ids that SGLang's dispatcher hands to a rank: local ids, −1 for an expert of another rank."""
    return ids if expert_map is None else expert_map[ids.long()]


def sglang_marlin(weights: ExpertWeights) -> Run:
    """Return SGLang's Marlin kernel for MoE layers with these weights. Raises NotHereError without SGLang."""
    require("sglang")
    from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe

    # These functions are imported from the module that uses them, because the first one's own module cannot be imported
    # before this one.
    from sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe import (
        gptq_marlin_moe_repack,
        marlin_make_workspace,
        marlin_moe_permute_scales,
    )

    device, experts = weights.device, weights.num_experts
    one_rank(device)
    # The empty order says that no activations are reordered.
    order = torch.empty(experts, 0, dtype=torch.int32, device=device)

    def matrix(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, inputs = packed.shape[1], packed.shape[2] * 8
        repacked = gptq_marlin_moe_repack(packed.transpose(1, 2).contiguous(), order, inputs, rows, 4)
        return repacked, marlin_moe_permute_scales(scale.transpose(1, 2).contiguous(), inputs, rows, 32)

    w1, w1_scale = matrix(weights.w13_packed, weights.w13_scale)
    w2, w2_scale = matrix(weights.w2_packed, weights.w2_scale)
    workspace = marlin_make_workspace(device, 4)

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        num_global = experts if expert_map is None else len(expert_map)
        return fused_marlin_moe(
            x,
            w1,
            w2,
            w1_scale,
            w2_scale,
            x.new_empty(len(x), num_global),  # the router's logits, of which only the shape is read
            topk_weights,
            local(ids, expert_map),
            global_num_experts=num_global,
            expert_map=expert_map,
            g_idx1=order,
            g_idx2=order,
            sort_indices1=order,
            sort_indices2=order,
            workspace=workspace,
            num_bits=4,
        )

    return run


def sglang_triton(weights: ExpertWeights) -> Run:
    """Return SGLang's Triton kernel for INT4 weights with these weights. Raises NotHereError without SGLang."""
    require("sglang")
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    one_rank(weights.device)
    w1, w2 = weights.w13_packed.view(torch.uint8), weights.w2_packed.view(torch.uint8)

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        num_global = len(w1) if expert_map is None else len(expert_map)
        return fused_experts(
            x,
            w1,
            w2,
            StandardTopKOutput(topk_weights, local(ids, expert_map), x.new_empty(len(x), num_global)),
            MoeRunnerConfig(num_experts=num_global, num_local_experts=len(w1), inplace=False),
            use_int4_w4a16=True,
            w1_scale=weights.w13_scale,
            w2_scale=weights.w2_scale,
            block_shape=[0, 32],
        )

    return run


def flashinfer_mxint4(weights: ExpertWeights) -> Run:
    """Return FlashInfer's MXINT4 experts, as SGLang calls them, with these weights.

    The kernel chooses the experts itself, so it gets logits by which it chooses those of the batch. Raises NotHereError
    without FlashInfer or SGLang, and on GPUs other than sm_100.
    """
    require("flashinfer")
    require("sglang")
    if torch.cuda.get_device_capability()[0] != 10:
        raise NotHereError("its MXINT4 experts are for sm_100")
    from flashinfer.fused_moe import trtllm_mxint4_block_scale_moe
    from sglang.srt.layers.moe.utils import RoutingMethodType
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsMxInt4MoE

    experts, inner = weights.num_experts, weights.w13_packed.shape[1] // 2
    # The method reads no other attribute of its object.
    cache_only = SimpleNamespace(_cache_permute_indices={})
    w1, w1_scale, w2, w2_scale = CompressedTensorsMxInt4MoE.prepare_static_weights_for_kernel(
        cache_only, weights.w13_packed, weights.w2_packed, weights.w13_scale, weights.w2_scale, experts
    )

    def run(
        x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        num_global = experts if expert_map is None else len(expert_map)
        out = torch.empty_like(x)
        trtllm_mxint4_block_scale_moe(
            routing_logits=asking_for(ids, topk_weights, num_global),
            routing_bias=torch.zeros(num_global, device=x.device),
            hidden_states=x,
            gemm1_weights=w1,
            gemm1_weights_scale=w1_scale,
            gemm1_alpha=None,
            gemm1_beta=None,
            gemm1_clamp_limit=None,
            gemm2_weights=w2,
            gemm2_weights_scale=w2_scale,
            num_experts=num_global,
            top_k=ids.shape[1],
            n_group=1,
            topk_group=1,
            intermediate_size=inner,
            local_expert_offset=0,
            local_num_experts=experts,
            routed_scaling_factor=1.0,
            routing_method_type=RoutingMethodType.DeepSeekV3,
            tune_max_num_tokens=1 << (len(x) - 1).bit_length(),
            output=out,
        )
        return out * topk_weights.sum(-1, keepdim=True).to(out.dtype)

    return run


PEERS: dict[str, Peer] = {
    "SGLang Marlin MoE": sglang_marlin,
    "SGLang Triton WNA16": sglang_triton,
    "FlashInfer MxInt4": flashinfer_mxint4,
}
