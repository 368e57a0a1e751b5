"""Implements the experts' part of vLLM's modular kernel. The kernel's other part (prepare/finalize) sends tokens to the
ranks of their experts and their results back."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)

from k26_plugins.common.experts.parameters import LayerExperts


def experts_for(prepare_finalize: Any, moe: FusedMoEConfig, quant_config: Any, experts: LayerExperts) -> K26Experts:
    """Return the experts' part for the activation format in which the prepare/finalize part hands tokens over."""
    if prepare_finalize.activation_format == mk.FusedMoEActivationFormat.Standard:
        return K26Experts(moe, quant_config, experts)
    buffers = {
        "max_num_tokens": prepare_finalize.max_num_tokens_per_rank(),
        "num_dispatchers": prepare_finalize.num_dispatchers(),
    }
    return K26BatchedExperts(moe, quant_config, experts, **buffers)


class K26Experts(mk.FusedMoEExpertsModular):
    """The experts' part of the kernel for tokens in one tensor. The core weights and sums a token's experts too."""

    def __init__(
        self, moe_config: FusedMoEConfig, quant_config: Any, experts: LayerExperts, **buffers: int | None
    ) -> None:
        super().__init__(moe_config, quant_config, **buffers)
        self.experts = experts

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        """Return that all tokens come in one tensor."""
        return mk.FusedMoEActivationFormat.Standard

    # vLLM asks the following methods of each class that it may choose. It never chooses this one, because the
    # quantization method has already done so, but they are abstract.
    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return getattr(activation, "value", activation) == "silu"

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def supports_expert_map(self) -> bool:
        """Return True, because the core's experts take vLLM's `expert_map`."""
        return True

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """Return (local experts, tokens, rows of w13, hidden size, top_k).

        The rows of w13 come from the layer's configuration, because the shapes of weights that a backend has repacked
        do not show them.
        """
        rows = 2 * self.moe_config.intermediate_size_per_partition
        return w1.shape[0], a1.shape[0], rows, a1.shape[-1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        *args: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the two workspaces and of the output; the core needs the second workspace only."""
        # vLLM's second workspace is the core's scratch memory. The third shape is the output's.
        num_bytes = self.experts.workspace_bytes(M, topk, global_num_experts)
        return (0,), (-(-num_bytes // self.moe_config.in_dtype.itemsize),), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Return vLLM's step that does nothing, because the core weights and sums a token's experts."""
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *args: Any,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        **kwargs: Any,
    ) -> None:
        """Write the routed sum to `output`."""
        # w1 and w2 are not used: `experts` reads them and their scales from the layer's parameters.
        workspace = workspace2.view(torch.uint8) if workspace2.numel() else None
        self.experts.apply(output, hidden_states, topk_weights, topk_ids, expert_map, workspace)


class K26BatchedExperts(K26Experts):
    """The experts' part of the kernel for tokens in a buffer for each expert (DeepEP's low latency mode, NIXL).

    vLLM weights and sums a token's chosen experts.
    """

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        """Return that each expert's tokens come in a buffer of their own."""
        return mk.FusedMoEActivationFormat.BatchedExperts

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """Return the same sizes as the base class, with the length of an expert's buffer as the number of tokens."""
        return super().moe_problem_size(a1[0], w1, w2, topk_ids)

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int, *args: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the two workspaces, which are empty, and of the output."""
        assert self.max_num_tokens is not None
        assert self.num_dispatchers is not None
        return (0,), (0,), (local_num_experts, self.max_num_tokens * self.num_dispatchers, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Return vLLM's step that leaves weighting and the sum to its combine."""
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *args: Any,
        expert_tokens_meta: Any,
        **kwargs: Any,
    ) -> None:
        """Write each expert's results to its buffer in `output`."""
        assert self.num_dispatchers is not None
        # The estimate assumes that each rank that sends tokens has about as many as this one.
        expected = topk_ids.numel() * self.num_dispatchers / global_num_experts
        self.experts.apply_by_expert(output, hidden_states, expert_tokens_meta.expert_num_tokens, expected)
