"""Put the native experts behind the core's interface: a batch's tensors become the pointers that the library takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch

from k26_plugins.common.experts.base import ExpertsBackend, ExpertWeights, RoutedBatch, Sizes
from k26_plugins.common.experts.native.build import BuildError, library
from k26_plugins.common.experts.native.layout import restore_rows
from k26_plugins.common.experts.native.threads import Call, Layer, process_threads


class NativeExperts(ExpertsBackend):
    """Experts in C++ on CPUs with a vector unit, which read INT4 weights at the memory's bandwidth.

    Activations are rounded to 16 bits, as multiples of the largest one of their group of 32. A token's result has the
    same bits in any batch, with any number of threads and on every instruction set.
    """

    name = "native"
    device_type = "cpu"
    out_dtypes = (torch.bfloat16, torch.float32)

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__(weights)
        self.weights = weights
        self.layer = _layer(weights)

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """Return why this backend cannot be used, or None on a CPU for which the library is there or can be built."""
        if weights.device.type != "cpu":
            return f"the weights are on {weights.device}"
        try:
            library()
        except BuildError as error:
            return str(error)
        return None

    @classmethod
    def place(cls, weights: ExpertWeights) -> None:
        """Have the threads that will compute the layer write its pages first, so that each lies on their NUMA node."""
        process_threads().place(_layer(weights))

    @classmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Repack in place, by the threads that will compute the layer."""
        experts = cls(ExpertWeights(*(tensor.contiguous() for tensor in weights.parts())))
        process_threads().repack(experts.layer)
        return experts

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the checkpoint's four tensors, whose rows are repacked in place."""
        return {
            "w13_packed": self.weights.w13_packed,
            "w13_scale": self.weights.w13_scale,
            "w2_packed": self.weights.w2_packed,
            "w2_scale": self.weights.w2_scale,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Take over weights whose rows are repacked."""
        return cls(ExpertWeights(**tensors))

    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """Undo the repacking of rows."""
        return ExpertWeights(
            *restore_rows(tensors["w13_packed"], tensors["w13_scale"], gated=True),
            *restore_rows(tensors["w2_packed"], tensors["w2_scale"], gated=False),
        )

    def _forward(self, batch: RoutedBatch) -> None:
        """Compute in C++, on torch's threads or the pool's."""
        process_threads().run(self.layer, _call(batch))

    def _start_forward(self, batch: RoutedBatch) -> Callable[[], None]:
        """Start the work on the pool's threads and return at once."""
        return process_threads().submit(self.layer, _call(batch), (*batch, *self.tensors().values())).wait


def _call(batch: RoutedBatch) -> Call:
    """Return the batch as the library takes it."""
    expert_map = batch.expert_map
    num_tokens, top_k = batch.topk_ids.shape
    return Call(
        batch.hidden_states.data_ptr(),
        batch.topk_ids.data_ptr(),
        batch.topk_weights.data_ptr(),
        None if expert_map is None else expert_map.data_ptr(),
        0 if expert_map is None else expert_map.numel(),
        num_tokens,
        top_k,
        batch.out.data_ptr(),
        batch.out.dtype == torch.float32,
    )


def _layer(weights: ExpertWeights) -> Layer:
    """Return the layer as the library takes it; its tensors must be contiguous and live as long as it is used."""
    return Layer(
        *(tensor.data_ptr() for tensor in weights.parts()),
        weights.num_experts,
        weights.hidden_size,
        weights.intermediate_size,
    )
