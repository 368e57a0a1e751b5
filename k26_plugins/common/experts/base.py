"""The routed INT4 experts of one MoE layer: their weights, and the interface that every backend offers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, Self

import torch

from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR


class ExpertsError(ValueError):
    """Experts that no backend can compute rightly. The message names what was found and the remedy."""


class Expert(NamedTuple):
    """One expert as the checkpoint packs it. `I` is the intermediate size (of this shard), `H` the hidden size."""

    w13_packed: torch.Tensor
    """int32 `[2 I, H / 8]`, the gate projection's rows, then the up projection's."""
    w13_scale: torch.Tensor
    """bfloat16 `[2 I, H / 32]`."""
    w2_packed: torch.Tensor
    """int32 `[H, I / 8]`."""
    w2_scale: torch.Tensor
    """bfloat16 `[H, I / 32]`."""


class Sizes(Protocol):
    """What a backend must know of a layer's experts on this rank to say whether it can run them."""

    @property
    def num_experts(self) -> int:
        """How many experts lie on this rank."""

    @property
    def hidden_size(self) -> int:
        """Width of an expert's input and output."""

    @property
    def intermediate_size(self) -> int:
        """This rank's part of an expert's width between its two GEMMs."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie, or will."""


class Batches(NamedTuple):
    """What of an engine's batches, of whatever size, decides which kernels compute them."""

    top_k: int
    num_global_experts: int | None
    """The length of the expert map that they come with; None where they come without."""
    dtype: torch.dtype
    """The routed sum's."""
    logger: logging.Logger
    """The engine's, for what is done for them."""
    by_expert: bool = False
    """Whether they come as `ExpertsBackend.apply_by_expert` takes them."""


class LayerSizes(NamedTuple):
    """`Sizes` of weights that do not exist yet."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    device: torch.device


@dataclass(slots=True)
class ExpertWeights:
    """The experts of a layer that live on this rank, each field of `Expert` stacked to `[E, ...]`.

    Under tensor parallelism `I` is this rank's part: rows of w13 (gate and up each), columns of w2.
    """

    w13_packed: torch.Tensor
    w13_scale: torch.Tensor
    w2_packed: torch.Tensor
    w2_scale: torch.Tensor

    def __post_init__(self) -> None:
        for name, dtype in (
            ("w13_packed", torch.int32),
            ("w13_scale", torch.bfloat16),
            ("w2_packed", torch.int32),
            ("w2_scale", torch.bfloat16),
        ):
            tensor: torch.Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.dim() != 3:
                raise ExpertsError(
                    f"expert tensor {name} is {tensor.dtype} with {tensor.dim()} dimensions, expected {dtype} with 3: "
                    f"use the checkpoint as published, without conversion."
                )
        num_experts, hidden_size, intermediate_size = self.num_experts, self.hidden_size, self.intermediate_size
        expected = {
            "w13_packed": (num_experts, 2 * intermediate_size, hidden_size // PACK_FACTOR),
            "w13_scale": (num_experts, 2 * intermediate_size, hidden_size // GROUP_SIZE),
            "w2_packed": (num_experts, hidden_size, intermediate_size // PACK_FACTOR),
            "w2_scale": (num_experts, hidden_size, intermediate_size // GROUP_SIZE),
        }
        are_whole_groups = hidden_size % GROUP_SIZE == 0 and intermediate_size % GROUP_SIZE == 0
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape or not are_whole_groups:
                raise ExpertsError(
                    f"expert tensor {name} has shape {list(getattr(self, name).shape)}, expected {list(shape)} with "
                    f"hidden size {hidden_size} and intermediate size {intermediate_size} multiples of {GROUP_SIZE}: choose "
                    f"a tensor parallel size that leaves whole groups on each rank."
                )

    @property
    def num_experts(self) -> int:
        """How many experts lie on this rank."""
        return self.w13_packed.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of an expert's input and output."""
        return self.w2_packed.shape[1]

    @property
    def intermediate_size(self) -> int:
        """This rank's part of an expert's width between its two GEMMs."""
        return self.w2_packed.shape[2] * PACK_FACTOR

    @property
    def device(self) -> torch.device:
        """Where all four tensors lie."""
        return self.w13_packed.device

    def expert(self, index: int) -> Expert:
        """Views of one expert's tensors; `index` is local."""
        return Expert(self.w13_packed[index], self.w13_scale[index], self.w2_packed[index], self.w2_scale[index])

    def copy_of(self, indices: list[int]) -> ExpertWeights:
        """A copy of some of the experts, in the order given."""
        return ExpertWeights(*(tensor[indices] for tensor in self.parts()))

    def to(self, device: torch.device) -> ExpertWeights:
        """The same weights on another device; without a copy where they are there already."""
        return ExpertWeights(*(tensor.to(device) for tensor in self.parts()))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four tensors, in the order of `Expert`."""
        return self.w13_packed, self.w13_scale, self.w2_packed, self.w2_scale


class RoutedBatch(NamedTuple):
    """A batch as a backend's `_forward` takes it: of the right shapes, contiguous, and where the weights lie."""

    hidden_states: torch.Tensor
    """`[num_tokens, hidden_size]`, in the backend's `activation_dtype`."""
    topk_ids: torch.Tensor
    """int32 `[num_tokens, top_k]`. They are global where there is an `expert_map`, and local otherwise; a number that is no
    expert's counts as −1. `local_ids` maps both to local ones, for a backend whose kernels do not."""
    topk_weights: torch.Tensor
    """float32 `[num_tokens, top_k]`."""
    expert_map: torch.Tensor | None
    """int32 `[num_global_experts]`."""
    out: torch.Tensor
    """`[num_tokens, hidden_size]`, in one of the backend's `out_dtypes`: what the routed sum is written to."""
    workspace: torch.Tensor | None
    """As the caller gave it."""
    result: torch.Tensor
    """What the caller gets: `out` itself, or another tensor where that is no form in which the backend writes."""

    def finish(self) -> torch.Tensor:
        """`result`, with what was written to `out`."""
        return self.result if self.result is self.out else self.result.copy_(self.out)


class RoutedExperts(ABC):
    """Computes the routed sum of one layer, Σ weight · down(silu(gate · x) · (up · x)), over the experts that live here.

    Neither the shared expert nor the routed scaling factor is part of it: the first is the engine's, the second is in
    `topk_weights`. Under tensor or expert parallelism each rank returns its partial sum.
    """

    def workspace_bytes(self, num_tokens: int, top_k: int, num_global_experts: int | None = None) -> int:
        """Bytes of scratch that suffice for `apply` with up to `num_tokens` tokens; 0 if none.

        A caller that holds them itself passes them to `apply`; otherwise `apply` allocates.
        num_global_experts: the length of the expert map, where one is given.
        """
        del num_tokens, top_k, num_global_experts
        return 0

    @abstractmethod
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
        """The routed sum, `[num_tokens, hidden_size]` in the dtype of `hidden_states`, written to `out` if given.

        hidden_states: `[num_tokens, hidden_size]`. topk_ids: `[num_tokens, top_k]` integers, −1 for no expert.
        topk_weights: `[num_tokens, top_k]` float32. expert_map: `[num_global_experts]`, the local index of a global id
        or −1; without it the ids are local. workspace: uint8, at least `workspace_bytes`.

        Any other number that is no expert's, in the ids or in the map, counts as −1, on every backend and as in vLLM's own
        kernels: padded rows of a batch hold anything, and a device cannot raise an error without the host's waiting for it.

        Raises ExpertsError for a tensor of another shape.
        """


class ExpertsBackend(RoutedExperts):
    """One way to compute them, over all the weights that it was given: `_forward`, for which `apply` prepares a batch."""

    name: ClassVar[str]
    device_type: ClassVar[str | None]
    """The type of the devices that it is for, as torch names it; None for any."""
    tolerance: ClassVar[float] = 1e-2
    """The self-test's limit on the relative error: far above bfloat16's rounding (2e-3 on a right kernel) and far below
    what a wrong nibble order or scale gives (above 0.5)."""
    self_test_tokens: ClassVar[tuple[int, ...]] = (1, 64)
    """Batches of the self-test, in which every token chooses the same two experts: one for each path of the backend."""
    activation_dtype: ClassVar[torch.dtype | None] = torch.bfloat16
    """To which hidden states of another dtype are rounded; None for a backend that takes them as they are."""
    out_dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    """In which the backend writes, float32 among them, from which any other is converted; None for all."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    @classmethod
    @abstractmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """Why this backend cannot run weights of these sizes on their device, or None. Asked before they are created."""

    @classmethod
    def make_ready(cls, sizes: Sizes, batches: Batches) -> None:
        """Compile whatever these batches may run, so that no request waits for a compiler: by default there is nothing.

        Asked for each layer, before its weights are taken over: what layers have in common is to be done once.
        """

    @classmethod
    def place(cls, weights: ExpertWeights) -> None:
        """Prepare the memory of weights yet to be loaded for `load`, which repacks them there: nothing by default."""

    @classmethod
    @abstractmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Take the weights over, repacked expert by expert into the same storage where the sizes allow it."""

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
        """Check the batch, bring it into the form that kernels take, once for all backends, and compute it.

        No value is looked at, and where a tensor has that form already nothing is done to it: on a device nothing is
        launched and nothing waits.
        """
        batch = self._batch(hidden_states, topk_ids, topk_weights, expert_map, out, workspace)
        self._forward(batch)
        return batch.finish()

    def submit(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        expert_map: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Callable[[], torch.Tensor]:
        """Start `apply`; the function that is returned waits for the result. The arguments stay unchanged until then."""
        batch = self._batch(hidden_states, topk_ids, topk_weights, expert_map, out, None)
        wait_for_forward = self._start_forward(batch)

        def wait() -> torch.Tensor:
            wait_for_forward()
            return batch.finish()

        return wait

    def _batch(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        out: torch.Tensor | None,
        workspace: torch.Tensor | None,
    ) -> RoutedBatch:
        result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if out is None else out
        check_shapes(self.sizes.hidden_size, hidden_states, topk_ids, topk_weights, expert_map, result)
        device = self.sizes.device
        out = result
        is_written = self.out_dtypes is None or result.dtype in self.out_dtypes
        if not (is_written and result.is_contiguous() and result.device == device):
            out = torch.empty(result.shape, dtype=result.dtype if is_written else torch.float32, device=device)
        return RoutedBatch(
            _laid_out(hidden_states, self.activation_dtype or hidden_states.dtype, device),
            _laid_out(as_int32(topk_ids), torch.int32, device),
            _laid_out(topk_weights, torch.float32, device),
            None if expert_map is None else _laid_out(as_int32(expert_map), torch.int32, device),
            out,
            workspace,
            result,
        )

    @abstractmethod
    def _forward(self, batch: RoutedBatch) -> None:
        """Write the batch's routed sum to its `out`."""

    def _start_forward(self, batch: RoutedBatch) -> Callable[[], None]:
        """Start `_forward`; the function that is returned waits until it is done.

        A backend with threads of its own works meanwhile; here it is done at once.
        """
        self._forward(batch)
        return lambda: None

    def apply_by_expert(
        self, hidden_states: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, *, expected: float
    ) -> None:
        """What each expert gives for the tokens in its own buffer, unweighted: as DeepEP's low-latency dispatch has them.

        hidden_states: `[num_experts, max_tokens, hidden_size]`, contiguous. counts: int32 `[num_experts]`, how many tokens
        each buffer holds. out: like hidden_states; what lies beyond an expert's tokens is nobody's. expected: an expert's
        tokens on average, which a backend may choose its path by.
        """
        del expected
        num_experts, max_tokens, hidden_size = hidden_states.shape
        is_there = torch.arange(max_tokens, device=counts.device) < counts[:, None]
        experts = torch.arange(num_experts, dtype=torch.int32, device=counts.device)
        topk_ids = torch.where(is_there, experts[:, None], -1).view(-1, 1)
        topk_weights = torch.ones_like(topk_ids, dtype=torch.float32)
        self.apply(hidden_states.view(-1, hidden_size), topk_ids, topk_weights, out=out.view(-1, hidden_size))

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The repacked weights, each contiguous `[E, ...]` and self-contained per expert.

        An engine may register them as parameters and move an expert's rows between ranks (EPLB): what is computed
        follows the rows. Empty for a backend that keeps its weights to itself.
        """

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Experts over what `tensors()` of others gave, as it is: nothing is copied or repacked.

        Raises ExpertsError where `tensors()` is empty.
        """

    @abstractmethod
    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """The inverse of `load`: the checkpoint's layout of rows of `tensors()`, copied to any device.

        The copies may be overwritten. Raises ExpertsError where `tensors()` is empty.
        """


def check_shapes(
    hidden_size: int,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Raises ExpertsError, which names the tensor, unless the shapes are those of `RoutedExperts.apply`."""
    if topk_ids.dim() != 2:
        raise ExpertsError(f"topk_ids has shape {list(topk_ids.shape)}, expected [num_tokens, top_k].")
    num_tokens, top_k = topk_ids.shape
    expected = (num_tokens, hidden_size)
    for name, tensor, shape in (
        ("hidden_states", hidden_states, expected),
        ("topk_weights", topk_weights, (num_tokens, top_k)),
        ("out", out, expected),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ExpertsError(
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} for topk_ids {[num_tokens, top_k]} and "
                f"hidden size {hidden_size}."
            )
    if expert_map is not None and expert_map.dim() != 1:
        raise ExpertsError(f"expert_map has shape {list(expert_map.shape)}, expected [num_global_experts].")


def _laid_out(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A call of `to` that has nothing to do takes longer than to see that it has not.
    if tensor.dtype != dtype or tensor.device != device:
        tensor = tensor.to(device, dtype)
    return tensor.contiguous()


def as_int32(ids: torch.Tensor) -> torch.Tensor:
    """The one width that kernels take. A number that is no expert's stays none: cut to 32 bits it could become one."""
    if ids.dtype == torch.int32:
        return ids
    if ids.dtype.itemsize > torch.int32.itemsize or ids.dtype.is_floating_point:
        ids = ids.clamp(-1, torch.iinfo(torch.int32).max)
    return ids.to(torch.int32)


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """int64 ids into the `num_experts` that live here, −1 for no expert or one that lives elsewhere."""
    local = topk_ids.long()
    if expert_map is not None:
        # The last entry is that of every id that the map does not have.
        table = torch.cat((expert_map.long(), expert_map.new_full((1,), -1, dtype=torch.int64)))
        local = table[torch.where((local >= 0) & (local < len(expert_map)), local, len(expert_map))]
    return torch.where((local >= 0) & (local < num_experts), local, -1)


def tokens_by_expert(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int
) -> list[tuple[int, torch.Tensor]]:
    """For each local expert with tokens, in order: its index and its token–expert pairs, each as token · top_k + k."""
    local = local_ids(topk_ids, expert_map, num_experts).flatten()
    order = torch.argsort(local, stable=True)
    # Pairs with −1 sort first and are dropped.
    counts = torch.bincount(local + 1, minlength=num_experts + 1).tolist()
    pairs_by_expert = order.split(counts)[1:]
    return [(expert, pairs) for expert, pairs in enumerate(pairs_by_expert) if len(pairs)]
