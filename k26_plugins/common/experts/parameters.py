"""Keep a layer's experts as parameters of an engine's module, which owns the only copy of the weights.

While a layer is open, weights can be loaded, and the parameters are as the checkpoint packs them. While it is closed,
it serves, and the parameters are as its backend repacked them, in the same storage. To update the weights, an engine
opens the layer, which restores the checkpoint's form, loads, and closes the layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from k26_plugins.common.experts import create_experts, find_backend, place_memory, why_unsupported
from k26_plugins.common.experts.base import Batches, Expert, ExpertsBackend, ExpertsError, ExpertWeights, LayerSizes
from k26_plugins.common.experts.op import held_experts, number_of, routed_experts
from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR

# The parameters' names as the engines' loaders know them, in the order of `Expert`.
PACKED_NAMES = ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")
# For each projection of the checkpoint: how its parameter's name begins, which block of the parameter's rows it fills,
# and how many such blocks the parameter has.
_BLOCKS = {"gate": ("w13", 0, 2), "up": ("w13", 1, 2), "down": ("w2", 0, 1)}
# How many projections each parameter of PACKED_NAMES holds.
_PROJECTIONS = (2, 2, 1, 1)


def loader_attributes(given: Mapping[str, Any]) -> Callable[[torch.nn.Parameter], None]:
    """Return a function that gives a parameter the attributes that the engines' weight loaders read.

    By them a weight loader cuts a tensor for tensor parallelism and finds an expert's place in the parameter. given:
    the attributes that the engine hands over for its parameters.
    """
    attributes = {**given, "is_transposed": False, "quant_method": "group"}

    def set_attributes(parameter: torch.nn.Parameter) -> None:
        for name, value in attributes.items():
            setattr(parameter, name, value)

    return set_attributes


class LayerExperts:
    """A layer's experts on this rank, in the parameters of `layer`."""

    def __init__(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        backend_name: str,
        on_parameter: Callable[[torch.nn.Parameter], None],
        *,
        device: torch.device | None = None,
    ) -> None:
        """Register `w13_weight_packed`, `w2_weight_packed` and their `_scale`, each `[E, N, …]`; the layer is open.

        intermediate_size: this rank's part. backend_name: as `create_experts` takes it. on_parameter: gives each
        parameter the attributes that the engine's weight loader reads. device: where the parameters are created; by
        default torch's default device. The checkpoint's `_shape` tensors get no parameter, because they say nothing
        that the configuration does not say. Raises ExpertsError, before anything is created, if no such backend takes
        these sizes on this device.
        """
        self.device = torch.get_default_device() if device is None else device
        sizes = LayerSizes(num_experts, hidden_size, intermediate_size, self.device)
        # A hybrid run may have no expert of a layer on its device.
        if num_experts and (reason := why_unsupported(sizes, backend_name)) is not None:
            raise ExpertsError(f"no experts backend can be used on {self.device}: {reason}.")
        self.layer = layer
        self.num_experts = num_experts
        self.backend_name = backend_name
        self._on_parameter = on_parameter
        shapes = (
            (num_experts, 2 * intermediate_size, hidden_size // PACK_FACTOR),
            (num_experts, 2 * intermediate_size, hidden_size // GROUP_SIZE),
            (num_experts, hidden_size, intermediate_size // PACK_FACTOR),
            (num_experts, hidden_size, intermediate_size // GROUP_SIZE),
        )
        self._shapes = dict(zip(PACKED_NAMES, shapes, strict=True))
        # The parameters with which the layer served before it was opened. They are kept while it is open, so that CUDA
        # graphs and pinned memory find the weights at the same addresses afterwards.
        self._serving: dict[str, torch.nn.Parameter] = {}
        self._held: ExpertsBackend | None = None
        self._number = -1
        self._awaited: dict[str, int] = {}
        self._loaders: dict[str, object] = {}
        self._was_closed = False
        self._takes_workspace = False
        self._create()

    @property
    def is_open(self) -> bool:
        """Whether the parameters are as the checkpoint packs them, ready to be loaded."""
        return PACKED_NAMES[0] in self.layer._parameters

    @property
    def is_on_host(self) -> bool:
        """Whether the layer is open and its experts both lie in host memory and are to be computed from there."""
        if self.device.type != "cpu" or not self.is_open:
            return False
        # An engine that reloads a layer keeps the layer's tensors elsewhere until all of them have arrived.
        return self.layer.get_parameter(PACKED_NAMES[0]).device.type == "cpu"

    def place(self, projection: str, part: str) -> torch.Tensor | None:
        """Return the tensor to which a loader may copy tensors of a kind while the layer is open.

        The tensor is a view, int32 `[num_experts, N, K / 8]` for packed weights or bfloat16 `[num_experts, N, K / 32]`
        for scales.

        Returns None if the parameter's `weight_loader` is no longer the one that it was created with: then each tensor
        must be given to the one that replaced it. projection: gate, up or down. part: packed or scale.
        """
        weight, block, num_blocks = _BLOCKS[projection]
        name = f"{weight}_weight_{part}"
        parameter: Any = self.layer._parameters[name]
        if getattr(parameter, "weight_loader", None) is not self._loaders[name]:
            return None
        return parameter.data.chunk(num_blocks, dim=1)[block]  # type: ignore[no-any-return]

    @property
    def is_restorable(self) -> bool:
        """Whether opening the layer restores the weights that it has: not if the backend keeps them to itself."""
        return self._held is None

    def open(self) -> bool:
        """Restore the checkpoint's form of the weights in the same storage, expert by expert.

        For a backend that keeps its weights to itself there is nothing to restore: then all weights must be loaded
        before the layer is closed. Returns False, and does nothing, if the layer is already open.
        """
        if self.is_open:
            return False
        if self._held is not None:
            self._create()
            self._awaited = {
                name: self.num_experts * count for name, count in zip(PACKED_NAMES, _PROJECTIONS, strict=True)
            }
            for name in PACKED_NAMES:
                self._count_loads(name)
            return True
        tensors = self.tensors()
        backend = self.backend()
        packed = {
            name: tensor.data if tensor.shape == shape else tensor.new_empty(shape)
            for (name, shape), tensor in zip(self._shapes.items(), tensors.values(), strict=True)
        }
        for expert in range(self.num_experts):
            restored = backend.restore({name: rows[expert : expert + 1].clone() for name, rows in tensors.items()})
            for target, field in zip(packed.values(), Expert._fields, strict=True):
                target[expert].copy_(getattr(restored, field)[0])
        self._serving = {name: self.layer._parameters[f"k26_{name}"] for name in tensors}  # type: ignore[misc]
        for name in tensors:
            delattr(self.layer, f"k26_{name}")
        for name, tensor in packed.items():
            self._register(name, tensor)
        return True

    def close(self, batches: Batches | None = None) -> bool:
        """Give the loaded weights to the backend, after the backend's self-test with them.

        batches: the batches for which the backend compiles its kernels; None if it did so before, as at an update.
        Returns False, and does nothing, if the layer is already closed. Raises ExpertsError if no backend may serve the
        weights, or if an update did not bring all the tensors that it had to.
        """
        if not self.is_open:
            return False
        if missing := sum(self._awaited.values()):
            raise ExpertsError(
                f"the update lacks {missing} tensors of a layer's experts, and {self.backend_name} keeps its weights to "
                f"itself: send whole layers, or choose the core's experts (K26_EXPERTS=auto, K26_CPU_EXPERTS=auto)."
            )
        weights = self._packed()
        backend = create_experts(weights, self.backend_name, update=self._was_closed, batches=batches)
        # An update keeps the backend that `auto` chose.
        self.backend_name, self._was_closed = backend.name, True
        for name in PACKED_NAMES:
            delattr(self.layer, name)
        self._held = None
        self._takes_workspace = type(backend).workspace_bytes is not ExpertsBackend.workspace_bytes
        if not backend.tensors():
            self._held, self._number = backend, number_of(backend)
        for name, tensor in backend.tensors().items():
            parameter = self._serving.get(name)
            if parameter is None:
                parameter = torch.nn.Parameter(tensor, requires_grad=False)
            elif parameter.data_ptr() != tensor.data_ptr():
                parameter.data.copy_(tensor)
            # The tensors are registered so that an engine finds the weights that are computed with, and can move them
            # (EPLB).
            self.layer.register_parameter(f"k26_{name}", parameter)
        self._serving = {}
        return True

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters with which the closed layer serves, by the names of `ExpertsBackend.tensors()`.

        The packed weights are int32 and the scales bfloat16, `[num_experts, …]` in the backend's own shapes, on
        `device`. The dict is empty for a backend that keeps its weights to itself. Raises ExpertsError while the layer
        is open.
        """
        if self.is_open:
            raise ExpertsError("a layer's experts were asked while its weights are loaded: end the update first.")
        if self._held is not None:
            return {}
        return {name: getattr(self.layer, f"k26_{name}") for name in Expert._fields}

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the repacked w13 and w2, both int32 `[num_experts, …]`, for an engine that passes them on.

        For a backend that keeps its weights to itself both tensors are empty, `[num_experts, 0]`, of torch's default
        dtype.
        """
        tensors = self.tensors()
        if not tensors:
            none = torch.empty(self.num_experts, 0, device=self.device)
            return none, none
        return tensors["w13_packed"], tensors["w2_packed"]

    def workspace_bytes(self, num_tokens: int, top_k: int, num_global_experts: int | None = None) -> int:
        """Return the bytes of scratch memory that `apply` takes; 0 for a backend that needs none or has its own."""
        # On a CPU torch.compile traces this method, so no backend is created here for such experts. `apply` creates the
        # backend in the operator, into which torch.compile does not trace.
        if not self._takes_workspace:
            return 0
        return self.backend().workspace_bytes(num_tokens, top_k, num_global_experts)

    def backend(self) -> ExpertsBackend:
        """Return the backend over the layer's parameters as they are now."""
        if self._held is not None:
            return self._held
        backend: type[ExpertsBackend] = find_backend(self.backend_name)
        return backend.from_tensors(self.tensors())

    def apply(
        self,
        out: torch.Tensor,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """Write the routed sum to `out`, `[num_tokens, hidden_size]` in any floating dtype.

        Shapes, dtypes and devices of all arguments are those of `RoutedExperts.apply`.
        """
        tensors = self.tensors()
        if not tensors:
            held_experts(out, hidden_states, topk_weights, topk_ids, expert_map, self._number)
        else:
            inputs = (hidden_states, topk_weights, topk_ids, expert_map)
            routed_experts(out, *inputs, *tensors.values(), workspace, self.backend_name)

    def apply_by_expert(
        self, out: torch.Tensor, hidden_states: torch.Tensor, counts: torch.Tensor, expected: float
    ) -> None:
        """Write each expert's results for its buffer to `out`.

        Shapes, dtypes and devices of all arguments are those of `ExpertsBackend.apply_by_expert`.
        """
        self.backend().apply_by_expert(hidden_states, counts, out, expected=expected)

    def _packed(self) -> ExpertWeights:
        return ExpertWeights(*(self.layer.get_parameter(name).data for name in PACKED_NAMES))

    def _create(self) -> None:
        for name, shape in self._shapes.items():
            dtype = torch.int32 if name.endswith("_packed") else torch.bfloat16
            self._register(name, torch.empty(shape, dtype=dtype, device=self.device))
        if self.num_experts and self.is_on_host:
            place_memory(self._packed(), self.backend_name)

    def _register(self, name: str, tensor: torch.Tensor) -> None:
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        self.layer.register_parameter(name, parameter)
        self._on_parameter(parameter)
        self._loaders[name] = getattr(parameter, "weight_loader", None)

    def _count_loads(self, name: str) -> None:
        parameter: Any = self.layer.get_parameter(name)
        load, loaded = parameter.weight_loader, set[tuple[Any, ...]]()

        def weight_loader(param: Any, weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int) -> None:
            load(param, weight, weight_name, shard_id=shard_id, expert_id=expert_id)
            if (shard_id, expert_id) not in loaded:
                loaded.add((shard_id, expert_id))
                self._awaited[name] = max(0, self._awaited[name] - 1)

        parameter.weight_loader = weight_loader
