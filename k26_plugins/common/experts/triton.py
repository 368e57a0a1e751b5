"""Compute INT4 experts on CUDA and ROCm GPUs by the kernels of `k26_kernels`, if Triton is installed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Self

import torch

from k26_plugins.common.experts.base import (
    Batches,
    ExpertsBackend,
    ExpertWeights,
    LayerSizes,
    RoutedBatch,
    Sizes,
    as_int32,
)
from k26_plugins.common.settings import BATCH_INVARIANT

if TYPE_CHECKING:
    from k26_kernels import KernelExperts


def unusable_on(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None.

    Triton is imported only when this is called for a GPU, so that the core works without Triton.
    """
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA and ROCm GPUs, not on {device.type}"
    try:
        from k26_kernels import device_of
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with `pip install triton`"
    try:
        device_of(device)
    except ValueError as error:
        return str(error)
    return None


@cache
def _make_ready(sizes: LayerSizes, batches: Batches, batch_invariant: bool) -> None:
    """Compile the kernels once in a process, since the layers of a process have the same sizes."""
    from k26_kernels import Shape, compile_batched, compile_variants

    began = time.perf_counter()
    shape = Shape(sizes.hidden_size, sizes.intermediate_size, sizes.num_experts)
    if batches.by_expert:
        number = compile_batched(sizes.device, shape, batches.dtype, batch_invariant=batch_invariant)
    else:
        number = compile_variants(
            sizes.device,
            shape,
            batches.top_k,
            batches.dtype,
            num_global_experts=batches.num_global_experts,
            batch_invariant=batch_invariant,
        )
    batches.logger.info(
        "k26-plugins: the Triton kernels are compiled for batches of every size, %d variants of %d experts in %.1f s.",
        number,
        sizes.num_experts,
        time.perf_counter() - began,
    )


class TritonExperts(ExpertsBackend):
    """Experts on a GPU, with bfloat16 activations and INT4 weights repacked for the matrix instruction of the GPU."""

    name = "triton"
    device_type = "cuda"
    self_test_tokens = (1, 8, 16, 64, 400)  # one for each config of the kernels

    def __init__(self, experts: KernelExperts, batch_invariant: bool) -> None:
        shape = experts.shape
        device = experts.w13_packed.device
        super().__init__(LayerSizes(shape.num_experts, shape.hidden_size, shape.intermediate_size, device))
        self.experts = experts
        self.batch_invariant = batch_invariant

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """Return why the kernels cannot run (an unknown GPU, no Triton, or sizes that do not fit), or None."""
        reason = unusable_on(weights.device)
        if reason is not None:
            return reason
        from k26_kernels import Shape

        try:
            Shape(weights.hidden_size, weights.intermediate_size, weights.num_experts)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def make_ready(cls, sizes: Sizes, batches: Batches) -> None:
        """Compile every variant of the kernels that such batches can launch, once in a process."""
        found = LayerSizes(sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, sizes.device)
        _make_ready(found, batches, BATCH_INVARIANT.read())

    @classmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Rearrange the weights in place for the matrix instruction of the GPU."""
        from k26_kernels import KernelExperts

        experts = KernelExperts.from_checkpoint(*weights.parts())
        return cls(experts, BATCH_INVARIANT.read())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the four tensors in the kernels' layout, with the checkpoint's shapes."""
        return {
            "w13_packed": self.experts.w13_packed,
            "w13_scale": self.experts.w13_scale,
            "w2_packed": self.experts.w2_packed,
            "w2_scale": self.experts.w2_scale,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Take over tensors in the kernels' layout as they are."""
        from k26_kernels import KernelExperts

        return cls(KernelExperts.from_repacked(**tensors), BATCH_INVARIANT.read())

    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """Undo the repacking, in place, and return the tensors in the checkpoint's layout."""
        from k26_kernels.layout import restore

        fragment = self.experts.device.target.fragment
        restore(tensors["w13_packed"], tensors["w13_scale"], fragment, gated=True)
        restore(tensors["w2_packed"], tensors["w2_scale"], fragment, gated=False)
        return ExpertWeights(**tensors)

    def workspace_bytes(self, num_tokens: int, top_k: int, num_global_experts: int | None = None) -> int:
        """Return the bytes of workspace that suffice for the launches of a batch of up to `num_tokens` tokens."""
        from k26_kernels import workspace_bytes

        return workspace_bytes(self.experts, num_tokens, top_k, num_global_experts, self.batch_invariant)

    def _forward(self, batch: RoutedBatch) -> None:
        """Launch the kernels, which apply the expert map themselves; nothing waits for the device."""
        from k26_kernels import fused_experts

        fused_experts(
            batch.hidden_states,
            self.experts,
            batch.topk_ids,
            batch.topk_weights,
            expert_map=batch.expert_map,
            out=batch.out,
            workspace=batch.workspace,
            batch_invariant=self.batch_invariant,
        )

    def apply_by_expert(
        self, hidden_states: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, *, expected: float
    ) -> None:
        """Compute each expert for its buffer: the table of blocks comes from the counts, without sorting.

        Shapes and dtypes are those of `ExpertsBackend.apply_by_expert`.
        """
        from k26_kernels import batched_experts

        batched_experts(
            hidden_states.to(torch.bfloat16),
            self.experts,
            as_int32(counts),
            out,
            expected=expected,
            batch_invariant=self.batch_invariant,
        )
