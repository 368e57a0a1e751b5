"""Define the weights of one MoE layer's routed INT4 experts, and the interface that every backend offers.

A new backend is a subclass of `ExpertsBackend`. Another package offers one under a name in the entry-point group
`k26_plugins.experts`, and users choose it by that name; the core's own are in `BACKENDS` of this package's
`__init__.py`, and their names in `CORE_BACKENDS` of `common/settings.py`, in the order in which `auto` tries them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, Self

import torch

from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR


class ExpertsError(ValueError):
    """Raised for experts that no backend can compute correctly. The message names what was found and the remedy."""


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
    """The sizes and the device of a layer's experts on this rank, from which a backend says whether it can run them."""

    @property
    def num_experts(self) -> int:
        """Number of experts on this rank."""

    @property
    def hidden_size(self) -> int:
        """Width of an expert's input and output."""

    @property
    def intermediate_size(self) -> int:
        """Width of an expert between its two GEMMs, as far as it is on this rank."""

    @property
    def device(self) -> torch.device:
        """Device on which the weights lie or will lie."""


class Batches(NamedTuple):
    """The properties of an engine's batches that, beside the number of tokens, decide which kernels compute them."""

    top_k: int
    num_global_experts: int | None
    """Length of the expert map that comes with the batches; None if they come without a map."""
    dtype: torch.dtype
    """Dtype of the routed sum."""
    logger: logging.Logger
    """The engine's logger, which tells what a backend compiles for these batches."""
    by_expert: bool = False
    """Whether the tokens come in a buffer for each expert, as `ExpertsBackend.apply_by_expert` takes them."""


class LayerSizes(NamedTuple):
    """`Sizes` of weights that do not exist yet."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    device: torch.device


@dataclass(slots=True)
class ExpertWeights:
    """The experts of a layer that live on this rank, each field of `Expert` stacked to `[E, ...]`, on one device.

    Under tensor parallelism `I` is this rank's part, which cuts the rows of w13 (of gate and up each) and the columns
    of w2. Raises ExpertsError, when it is created, for tensors of another dtype or shape.
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
        """Number of experts on this rank."""
        return self.w13_packed.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of an expert's input and output."""
        return self.w2_packed.shape[1]

    @property
    def intermediate_size(self) -> int:
        """Width of an expert between its two GEMMs, as far as it is on this rank."""
        return self.w2_packed.shape[2] * PACK_FACTOR

    @property
    def device(self) -> torch.device:
        """Device of all four tensors."""
        return self.w13_packed.device

    def expert(self, index: int) -> Expert:
        """Return views of one expert's tensors; `index` is local to this rank."""
        return Expert(self.w13_packed[index], self.w13_scale[index], self.w2_packed[index], self.w2_scale[index])

    def copy_of(self, indices: list[int]) -> ExpertWeights:
        """Return a copy of some of the experts, in the order given."""
        return ExpertWeights(*(tensor[indices] for tensor in self.parts()))

    def to(self, device: torch.device) -> ExpertWeights:
        """Return the weights on a device, without a copy if they are there already."""
        return ExpertWeights(*(tensor.to(device) for tensor in self.parts()))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the four tensors, in the order of `Expert`."""
        return self.w13_packed, self.w13_scale, self.w2_packed, self.w2_scale


class RoutedBatch(NamedTuple):
    """A batch as a backend's `_forward` takes it: inputs and `out` are checked, contiguous, and on the weights' device.

    The workspace and `result` are as the caller gave them.
    """

    hidden_states: torch.Tensor
    """`[num_tokens, hidden_size]`, in the backend's `activation_dtype`."""
    topk_ids: torch.Tensor
    """int32 `[num_tokens, top_k]`: global ids if there is an `expert_map`, local ids otherwise. A number that names no
    expert counts as −1. A backend whose kernels do not apply the map themselves gets local ids from `local_ids`."""
    topk_weights: torch.Tensor
    """float32 `[num_tokens, top_k]`."""
    expert_map: torch.Tensor | None
    """int32 `[num_global_experts]`: the local index of each global id, −1 for an expert of another rank."""
    out: torch.Tensor
    """`[num_tokens, hidden_size]` in one of the backend's `out_dtypes`: the tensor that gets the routed sum."""
    workspace: torch.Tensor | None
    """uint8, or None for a kernel that is to allocate its own."""
    result: torch.Tensor
    """The tensor that the caller gets: `out` itself, or another one if the backend cannot write to it directly."""

    def finish(self) -> torch.Tensor:
        """Return `result`, to which `out` is copied first if they are two tensors."""
        return self.result if self.result is self.out else self.result.copy_(self.out)


class RoutedExperts(ABC):
    """The routed experts of one layer on this rank, which compute Σ weight · down(silu(gate · x) · (up · x)).

    This routed sum includes neither the shared expert, which the engine adds, nor a routed scaling factor, which
    `topk_weights` already contains. Under tensor or expert parallelism each rank returns its partial sum.
    """

    def workspace_bytes(self, num_tokens: int, top_k: int, num_global_experts: int | None = None) -> int:
        """Return the bytes of scratch memory that suffice for `apply` with up to `num_tokens` tokens; 0 for none.

        A caller that holds this memory itself passes it to `apply` as the workspace; otherwise `apply` allocates it.
        num_global_experts: the length of the expert map, if there is one.
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
        """Return the routed sum, `[num_tokens, hidden_size]` in the dtype of `hidden_states`, or in `out` if given.

        hidden_states: `[num_tokens, hidden_size]`, of a floating dtype; most backends round it to bfloat16. topk_ids:
        integers `[num_tokens, top_k]`, −1 for no expert. topk_weights: float32 `[num_tokens, top_k]`. expert_map:
        integers `[num_global_experts]`, the local index of a global id or −1; without it the ids are local. out:
        `[num_tokens, hidden_size]`, of a floating dtype; by default a new tensor on the device of `hidden_states`.
        workspace: uint8, at least `workspace_bytes` elements, on the device of the weights.

        Any other number that names no expert, in the ids or in the map, counts as −1 on every backend, as it does in
        vLLM's own kernels: padded rows of a batch may hold anything, and raising an error would make the host wait for
        the device.

        Raises ExpertsError for a tensor of another shape.
        """


class ExpertsBackend(RoutedExperts):
    """Routed experts computed in one particular way, over the weights that the backend was loaded with.

    `apply` checks a batch and converts it; a subclass computes it in `_forward`.
    """

    name: ClassVar[str]
    device_type: ClassVar[str | None]
    """Type of the devices that the backend runs on, as torch names it; None for any."""
    tolerance: ClassVar[float] = 1e-2
    """The self-test's limit on the relative error: far above bfloat16's rounding (2e-3 on a right kernel) and far below
    what a wrong nibble order or scale gives (above 0.5)."""
    self_test_tokens: ClassVar[tuple[int, ...]] = (1, 64)
    """Numbers of tokens in the self-test's batches, one batch for each code path of the backend. Every token chooses
    the same two experts."""
    activation_dtype: ClassVar[torch.dtype | None] = torch.bfloat16
    """Dtype to which hidden states of another dtype are rounded; None for a backend that takes them as they are."""
    out_dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    """Dtypes in which the backend can write the routed sum; None for all. float32 must be among them: for a caller that
    wants a dtype that is missing here, `apply` converts the sum from float32."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    @classmethod
    @abstractmethod
    def unsupported(cls, weights: Sizes) -> str | None:
        """Return why this backend cannot run weights of these sizes on their device, or None if it can.

        This is asked before the weights are created.
        """

    @classmethod
    def make_ready(cls, sizes: Sizes, batches: Batches) -> None:
        """Compile every kernel that these batches may run, so that no request waits for a compiler; by default nothing.

        This is called for each layer, before `load` takes its weights over, so a backend should do only once what its
        layers have in common.
        """

    @classmethod
    def place(cls, weights: ExpertWeights) -> None:
        """Prepare the memory of weights that are yet to be loaded and that `load` will repack in place.

        By default this does nothing.
        """

    @classmethod
    @abstractmethod
    def load(cls, weights: ExpertWeights) -> Self:
        """Take the weights over, repacking them expert by expert, in the same storage if the sizes allow it."""

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
        """Check the batch, convert it to the form in which every backend takes it, and compute it.

        Arguments and result are those of `RoutedExperts.apply`. A tensor on another device than the weights is copied
        to theirs. The checks read no values, and a tensor that already has that form is used as it is; then the
        preparation launches nothing on a device and does not wait for it.
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
        """Start `apply` and return a function that waits for its result. The arguments must not change until then.

        Arguments and result are those of `RoutedExperts.apply`.
        """
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
        """Start `_forward` and return a function that waits until it is done.

        A backend with threads of its own overrides this and works meanwhile; by default the work is done before
        returning.
        """
        self._forward(batch)
        return lambda: None

    def apply_by_expert(
        self, hidden_states: torch.Tensor, counts: torch.Tensor, out: torch.Tensor, *, expected: float
    ) -> None:
        """Write to `out` each expert's results for the tokens in its own buffer, without routing weights.

        Tokens come in such buffers from DeepEP's low-latency dispatch, for example.

        hidden_states: `[num_experts, max_tokens, hidden_size]`, contiguous, of a floating dtype; most backends round it
        to bfloat16. counts: int32 `[num_experts]`, the number of tokens in each buffer. out: contiguous
        `[num_experts, max_tokens, hidden_size]`, of a floating dtype; its rows beyond an expert's tokens are undefined.
        All are on the device of the weights. expected: the mean number of tokens of an expert, by which a backend may
        choose its code path.
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
        """Return the repacked weights by name, each contiguous `[E, ...]`; an expert's rows need no other expert's.

        The names are those of the fields of `Expert`. Dtypes are int32 for packed weights and bfloat16 for scales;
        shapes beyond the first dimension are the backend's own. An engine may register these tensors as parameters and
        move an expert's rows between ranks (EPLB): the results follow the rows. The dict is empty for a backend that
        keeps its weights to itself.
        """

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return a backend over tensors that another one's `tensors()` gave, without copying or repacking them.

        Raises ExpertsError for a backend whose `tensors()` is empty.
        """

    @abstractmethod
    def restore(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """Return some experts in the checkpoint's layout; this is the inverse of `load`.

        tensors: copies of those experts' rows of `tensors()`, on any device; they may be overwritten. Raises
        ExpertsError for a backend whose `tensors()` is empty.
        """


def check_shapes(
    hidden_size: int,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """Raise ExpertsError, which names the tensor, unless the shapes are those that `RoutedExperts.apply` takes.

    Dtypes and devices are not checked.
    """
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
    # These comparisons take less time than a call of `to` that has nothing to do.
    if tensor.dtype != dtype or tensor.device != device:
        tensor = tensor.to(device, dtype)
    return tensor.contiguous()


def as_int32(ids: torch.Tensor) -> torch.Tensor:
    """Return ids of any shape as int32, the only width that kernels take, on the same device.

    Wider numbers are clamped: if a number that names no expert were cut to 32 bits, it could become an expert's id.
    """
    if ids.dtype == torch.int32:
        return ids
    if ids.dtype.itemsize > torch.int32.itemsize or ids.dtype.is_floating_point:
        ids = ids.clamp(-1, torch.iinfo(torch.int32).max)
    return ids.to(torch.int32)


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """Return int64 local ids, in the shape of `topk_ids`: −1 for no expert and for an expert of another rank.

    topk_ids: integers of any shape. expert_map: integers `[num_global_experts]`, on the same device, or None if the ids
    are local. num_experts: how many experts this rank has.
    """
    local = topk_ids.long()
    if expert_map is not None:
        # Every id outside the map reads the table's last entry, −1.
        table = torch.cat((expert_map.long(), expert_map.new_full((1,), -1, dtype=torch.int64)))
        local = table[torch.where((local >= 0) & (local < len(expert_map)), local, len(expert_map))]
    return torch.where((local >= 0) & (local < num_experts), local, -1)


def tokens_by_expert(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int
) -> list[tuple[int, torch.Tensor]]:
    """Return (index, token–expert pairs) of each local expert with tokens, in order; a pair is token · top_k + k.

    topk_ids: integers `[num_tokens, top_k]`. expert_map, num_experts: as for `local_ids`. The pairs of an expert are
    int64 `[num_pairs]`, in ascending order.
    """
    local = local_ids(topk_ids, expert_map, num_experts).flatten()
    order = torch.argsort(local, stable=True)
    # Pairs with −1 sort first and are dropped.
    counts = torch.bincount(local + 1, minlength=num_experts + 1).tolist()
    pairs_by_expert = order.split(counts)[1:]
    return [(expert, pairs) for expert, pairs in enumerate(pairs_by_expert) if len(pairs)]
