"""The native experts behind the core's interface: what is checked before a pointer leaves Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import torch

from k26_plugins.common.experts.base import ExpertsBackend, ExpertsError, ExpertWeights, Sizes
from k26_plugins.common.experts.native.build import BuildError, library
from k26_plugins.common.experts.native.layout import restore_rows
from k26_plugins.common.experts.native.threads import Call, Layer, process_threads


class _Prepared(NamedTuple):
    call: Call
    tensors: tuple[torch.Tensor | None, ...]
    """What `call` points to."""
    written: torch.Tensor
    result: torch.Tensor
    """`written`, or what it is to be converted to."""

    def finish(self) -> torch.Tensor:
        return self.result if self.result is self.written else self.result.copy_(self.written)


class NativeExperts(ExpertsBackend):
    """INT4 weights at the memory's bandwidth on CPUs with a vector unit, activations in 16 bits of their group's largest.

    A token's result has the same bits in any batch, with any number of threads and on every instruction set.
    """

    name = "native"
    device_type = "cpu"

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights
        self.layer = _layer(weights)

    @classmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """It takes any CPU for which the library can be built."""
        if weights.device.type != "cpu":
            return f"the weights are on {weights.device}"
        try:
            library()
        except BuildError as error:
            return str(error)
        return None

    @classmethod
    def place(cls, weights: ExpertWeights) -> None:
        """Have the threads that will compute the layer write its pages first."""
        process_threads().place(_layer(weights))

    @classmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Repack in place, by the threads that will compute the layer."""
        experts = cls(ExpertWeights(*(tensor.contiguous() for tensor in weights.parts())))
        process_threads().repack(experts.layer)
        return experts

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's four tensors, whose rows are repacked in place."""
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

    def submit(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Callable[[], torch.Tensor]:
        """Start the work on the pool's threads and return at once."""
        prepared = self._prepare(hidden_states, topk_ids, topk_weights, expert_map, out)
        running = process_threads().submit(self.layer, prepared.call, (*prepared.tensors, *self.tensors().values()))

        def wait() -> torch.Tensor:
            running.wait()
            return prepared.finish()

        return wait

    def apply(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute in C++, on torch's threads or the pool's."""
        prepared = self._prepare(hidden_states, topk_ids, topk_weights, expert_map, out)
        process_threads().run(self.layer, prepared.call)
        return prepared.finish()

    def _prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> _Prepared:
        tokens, top_k = topk_ids.shape
        expected = (tokens, self.weights.hidden_size)
        for name, tensor, shape in (
            ("hidden_states", hidden_states, expected),
            ("topk_weights", topk_weights, (tokens, top_k)),
            ("out", out, expected),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ExpertsError(
                    f"{name} has shape {list(tensor.shape)}, expected {list(shape)} for topk_ids {[tokens, top_k]} and "
                    f"hidden size {self.weights.hidden_size}."
                )
        x = hidden_states.to("cpu", torch.bfloat16).contiguous()
        ids = to_int32(topk_ids).cpu().contiguous()
        weights = topk_weights.to("cpu", torch.float32).contiguous()
        local = None if expert_map is None else to_int32(expert_map).cpu().contiguous()
        result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if out is None else out
        # Written directly where the library can, and converted from float32 otherwise.
        direct = result.is_cpu and result.is_contiguous() and result.dtype in (torch.bfloat16, torch.float32)
        written = result if direct else torch.empty(expected, dtype=torch.float32)
        call = Call(
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            None if local is None else local.data_ptr(),
            0 if local is None else local.numel(),
            tokens,
            top_k,
            written.data_ptr(),
            written.dtype == torch.float32,
        )
        return _Prepared(call, (x, ids, weights, local, written), written, result)


def _layer(weights: ExpertWeights) -> Layer:
    """As the library takes it: the tensors, contiguous, must live as long as it is used."""
    return Layer(
        *(tensor.data_ptr() for tensor in weights.parts()),
        weights.num_experts,
        weights.hidden_size,
        weights.intermediate_size,
    )


def to_int32(ids: torch.Tensor) -> torch.Tensor:
    """A wider number that is no expert's stays none: cut to 32 bits it could become one."""
    return ids if ids.dtype == torch.int32 else ids.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
