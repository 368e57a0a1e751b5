"""kt-kernel's RAWINT4 experts, for comparison: called synchronously, because its stream calls do nothing without CUDA."""

from __future__ import annotations

from typing import Any

import torch

from k26_plugins.common.experts import ExpertWeights
from k26_plugins.common.int4 import GROUP_SIZE


class KtKernel:
    """Takes a copy of the packed weights. Raises ImportError where kt-kernel is not installed."""

    def __init__(self, weights: ExpertWeights, max_tokens: int, top_k: int, threads: int) -> None:
        from kt_kernel import kt_kernel_ext
        from kt_kernel.experts_base import BaseMoEWrapper
        from kt_kernel.utils import amx

        inner, experts = weights.intermediate_size, weights.num_experts
        self.pool: Any = BaseMoEWrapper._get_cpu_infer(threads, 1)
        # kt-kernel remembers these addresses.
        self.on_gpu = torch.zeros(experts, dtype=torch.bool)
        self.order = torch.arange(experts, dtype=torch.int64)
        config = kt_kernel_ext.moe.MOEConfig(experts, top_k, weights.hidden_size, inner, self.on_gpu.data_ptr())
        config.layer_idx = 0
        config.pool = self.pool.backend_
        config.max_len = max_tokens
        config.quant_config.bits, config.quant_config.group_size = 4, GROUP_SIZE
        config.quant_config.zero_point = False
        for name, packed in (
            ("gate_projs", weights.w13_packed[:, :inner]),
            ("up_projs", weights.w13_packed[:, inner:]),
            ("down_projs", weights.w2_packed),
            ("gate_scales", weights.w13_scale[:, :inner]),
            ("up_scales", weights.w13_scale[:, inner:]),
            ("down_scales", weights.w2_scale),
        ):
            setattr(config, name, [[matrix.data_ptr() for matrix in packed]])
        self.experts: Any = amx._select_rawint4_backend(GROUP_SIZE)(config)
        self.pool.submit(self.experts.load_weights_task(self.order.data_ptr()))
        self.pool.sync()

    def apply(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """`topk_ids` int64, otherwise as `ExpertsBackend.apply`."""
        out = torch.empty_like(hidden_states)
        count = torch.tensor([len(hidden_states)], dtype=torch.int32)
        pointers = (tensor.data_ptr() for tensor in (topk_ids, topk_weights, hidden_states, out))
        self.pool.submit(self.experts.forward_task(count.data_ptr(), topk_ids.shape[1], *pointers, False))
        self.pool.sync()
        return out
