"""Offers kt-kernel's RAWINT4 as a backend of the core.

It takes the checkpoint's INT4 bytes as they are and rounds activations to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from k26_plugins.common.experts.base import (
    ExpertsBackend,
    ExpertsError,
    ExpertWeights,
    LayerSizes,
    RoutedBatch,
    Sizes,
    local_ids,
)
from k26_plugins.common.host.cores import Core, cores
from k26_plugins.common.model.int4 import GROUP_SIZE
from k26_plugins.common.settings import CPU_THREADS
from k26_plugins.ktransformers import compat

# The largest number of tokens of one call, for which kt-kernel keeps buffers. Longer batches are split.
MAX_TOKENS = 2048
# The largest number of experts of one token: the published model's number.
MAX_TOP_K = 8
# Sizes must be multiples of kt-kernel's tiles. An intermediate size of 64 ends the process (0.7.2).
TILE = 128
# The number of experts is padded to a multiple of this. At small sizes a number that is no multiple of 4 ends the
# process, because kt-kernel's buffers are then misaligned.
EXPERTS_MULTIPLE = 8
KEEPS_WEIGHTS = "kt-kernel keeps its weights to itself: choose the core's experts with K26_CPU_EXPERTS=auto."


class KtExperts(ExpertsBackend):
    """kt-kernel's experts on a CPU.

    They are called without KTransformers' stream callbacks, which silently do nothing without CUDA. Each rank gives
    kt-kernel its own shard of every expert. KTransformers itself gives whole experts to the first rank alone, and a run
    with four ranks then answers garbage (ktransformers issue 2076).
    """

    name = "kt"
    device_type = "cpu"
    # Activations are rounded to 8 bits. On a correct kernel an error of 1.2 to 1.5 % was measured.
    tolerance: ClassVar[float] = 3e-2

    def __init__(self, moe: Any, pool: Any, sizes: Sizes, kept: tuple[torch.Tensor, ...]) -> None:
        """Keep kt-kernel's objects for a layer. kept: tensors whose addresses kt-kernel remembers."""
        super().__init__(sizes)
        self.moe = moe
        self.pool = pool
        self.kept = kept

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """Return why kt-kernel cannot compute these experts on this machine, or None if it can."""
        if weights.device.type != "cpu":
            return f"the weights are on {weights.device}"
        if (reason := compat.ends_the_process()) is not None:
            return reason
        try:
            compat.extension()
        except ImportError as error:
            return f"kt-kernel cannot be imported ({error})"
        raw_int4 = compat.raw_int4_class(GROUP_SIZE)
        if raw_int4 is None:
            return f"kt-kernel {compat.kt_kernel_version()} has no RAWINT4 experts for this CPU"
        nodes = _memory_nodes(cores(CPU_THREADS.read()))
        if len(nodes) > 1 and not compat.copies_weights(raw_int4):
            # The class would throw an exception in a thread of kt-kernel's, which ends the process.
            return (
                f"kt-kernel's {raw_int4.__name__} cannot split its weights among memory nodes {nodes}: start the process "
                f"on one of them (numactl --cpunodebind)"
            )
        for name, size in (("hidden size", weights.hidden_size), ("intermediate size", weights.intermediate_size)):
            if size % TILE:
                return f"{name} of {size} on this rank is no multiple of {TILE}"
        return None

    @classmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Load the weights into kt-kernel.

        kt-kernel copies the weights, so that they are in memory twice until this returns. kt-kernel's class for AVX2
        does not copy them but computes from the given tensors.
        """
        raw_int4 = compat.raw_int4_class(GROUP_SIZE)
        config_class = compat.extension().moe.MOEConfig
        chosen = cores(CPU_THREADS.read())
        pool = compat.cpu_infer(len(chosen), _memory_nodes(chosen))
        intermediate_size = weights.intermediate_size
        padded = -(-weights.num_experts // EXPERTS_MULTIPLE) * EXPERTS_MULTIPLE
        # The padding is marked as experts on a GPU, which kt-kernel does not compute.
        on_device = torch.arange(padded) >= weights.num_experts
        config = config_class(padded, MAX_TOP_K, weights.hidden_size, intermediate_size, on_device.data_ptr())
        config.layer_idx = 0
        config.pool = pool.backend_
        config.max_len = MAX_TOKENS
        config.quant_config.bits = 4
        config.quant_config.group_size = GROUP_SIZE
        config.quant_config.zero_point = False
        # kt-kernel takes a list of addresses for each NUMA node; there is one, as the checkpoint's bytes are not split.
        config.gate_projs = _addresses(weights.w13_packed[:, :intermediate_size], padded)
        config.up_projs = _addresses(weights.w13_packed[:, intermediate_size:], padded)
        config.down_projs = _addresses(weights.w2_packed, padded)
        config.gate_scales = _addresses(weights.w13_scale[:, :intermediate_size], padded)
        config.up_scales = _addresses(weights.w13_scale[:, intermediate_size:], padded)
        config.down_scales = _addresses(weights.w2_scale, padded)
        moe = raw_int4(config)
        order = torch.arange(padded, dtype=torch.int64)
        pool.submit(moe.load_weights_task(order.data_ptr()))
        pool.sync()
        kept = () if compat.copies_weights(raw_int4) else (weights.w13_packed, weights.w2_packed)
        sizes = LayerSizes(weights.num_experts, weights.hidden_size, intermediate_size, weights.device)
        return cls(moe, pool, sizes, (on_device, order, *kept))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return no tensors: kt-kernel gives no access to its copies, so EPLB cannot move them."""
        return {}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Raise ExpertsError, because kt-kernel keeps the weights in memory of its own."""
        raise ExpertsError(KEEPS_WEIGHTS)

    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """Raise ExpertsError, because kt-kernel does not give its weights back."""
        raise ExpertsError(KEEPS_WEIGHTS)

    def _forward(self, batch: RoutedBatch) -> None:
        x, weights = batch.hidden_states, batch.topk_weights
        top_k = batch.topk_ids.shape[1]
        if top_k > MAX_TOP_K:
            raise ExpertsError(
                f"kt-kernel was set up for {MAX_TOP_K} experts a token, this batch has {top_k}: choose the core's "
                f"experts with K26_CPU_EXPERTS=auto."
            )
        ids = local_ids(batch.topk_ids, batch.expert_map, self.sizes.num_experts)
        result = torch.empty_like(x)
        for start in range(0, len(x), MAX_TOKENS):
            part = slice(start, start + MAX_TOKENS)
            self._compute(x[part], ids[part], weights[part], result[part])
        batch.out.copy_(result)

    def _compute(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, result: torch.Tensor) -> None:
        num_tokens = torch.tensor([len(x)], dtype=torch.int32)
        task = self.moe.forward_task(
            num_tokens.data_ptr(),
            ids.shape[1],
            ids.data_ptr(),
            weights.data_ptr(),
            x.data_ptr(),
            result.data_ptr(),
            False,
        )
        self.pool.submit(task)
        self.pool.sync()


def _memory_nodes(chosen: list[Core]) -> list[int]:
    return sorted({core.node for core in chosen})


def _addresses(stacked: torch.Tensor, padded: int) -> list[list[int]]:
    """Return the address of each expert's matrix, which is contiguous. The padding repeats the first address."""
    found = [matrix.data_ptr() for matrix in stacked]
    return [found + found[:1] * (padded - len(found))]
