"""Routed experts on their way from a loader to the layers' parameters: one look-up and one copy for each tensor.

The engines' loaders compare the name of each of 208,550 tensors with over a thousand patterns, 250 µs each, and an engine's
loader of a parameter finds the tensor's place anew each time, 10 to 25 µs. And they repack the layers when the last of them
is loaded; experts in the host's memory are repacked here, layer by layer, while the next is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, NamedTuple, TypeVar

import torch

from k26_plugins.common.checkpoint.engine_files import num_experts_under_way
from k26_plugins.common.checkpoint.expert_names import ExpertKind, expert_names
from k26_plugins.common.experts.parameters import LayerExperts
from k26_plugins.common.host.cores import allowed_cpus
from k26_plugins.common.model.config import K26Config

# Where a projection lies: the parameter's beginning, and its name in the engines' loaders.
_PROJECTIONS = {"gate": ("w13", "w1"), "up": ("w13", "w3"), "down": ("w2", "w2")}
# A `weight_shape` has no place: it says nothing that the configuration does not.
_PARTS = ("packed", "scale")
_TENSORS_OF_EXPERT = len(_PROJECTIONS) * len(_PARTS)

Loaded = TypeVar("Loaded")
_Load = Callable[[torch.Tensor, int], None]
"""Loads a tensor of some kind, of an expert of the checkpoint."""


class Places(NamedTuple):
    """Where this rank keeps a layer's experts, by which they are loaded without the engine's loaders of the parameters."""

    sets: Sequence[LayerExperts]
    slots: Callable[[int], Iterable[tuple[int, int]]]
    """Where an expert of the checkpoint is kept: the number of the set and the place in it, once for each copy, and nowhere
    if only other ranks keep it."""
    rank: int
    num_ranks: int
    """In the tensor parallelism that cuts each expert."""


class ExpertsOfLayer(NamedTuple):
    """What of a layer the loading needs from an engine."""

    module: torch.nn.Module
    """That whose parameters are loaded."""
    experts: LayerExperts
    """Those of the layer that may be in the host's memory."""
    open: Callable[[], bool]
    """Prepares the parameters for the loading; whether it had to."""
    close: Callable[[], object]
    physical_ids: Callable[[int], Iterable[int]]
    """The ids under which the engine's loader of a parameter knows an expert of the checkpoint."""
    is_local: Callable[[int], bool]
    """Whether this rank keeps any of an expert of the checkpoint."""
    places: Places | None = None
    """None where the engine's loaders of the parameters alone know them."""


class _Repacking:
    """Closes layers on a thread of its own, one after another, beside the loading of others."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._begun: list[Future[bool]] = []

    def begin(self, experts: LayerExperts) -> None:
        """Raises what the closing of an earlier layer did."""
        if self._thread is None:
            # An engine pins the thread that loads to one core, and what it starts would inherit that.
            self._thread = ThreadPoolExecutor(1, "k26-repack", _use, (allowed_cpus(),))
        for one in self._begun:
            if one.done():
                one.result()
        self._begun.append(self._thread.submit(experts.close))

    def end(self) -> None:
        """Wait for all. Raises what the first closing did that failed."""
        for one in self._begun:
            one.result()

    def stop(self) -> None:
        """Wait for the layer that is being closed, and close no more."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def _use(cpus: set[int]) -> None:
    with suppress(OSError):  # a container may forbid it
        os.sched_setaffinity(0, cpus)


def is_needed(layers: Mapping[int, ExpertsOfLayer], config: K26Config) -> Callable[[ExpertKind, int], bool] | None:
    """Whether this rank keeps any of an expert's tensor; None where it keeps all."""
    text = config.text
    if len(layers) == text.num_hidden_layers - text.first_k_dense_replace and all(
        layer.is_local(expert) for layer in layers.values() for expert in range(text.n_routed_experts)
    ):
        return None
    return lambda kind, expert: kind.layer in layers and layers[kind.layer].is_local(expert)


def load_experts(
    weights: Iterable[tuple[str, torch.Tensor]], config: K26Config, layers: Mapping[int, ExpertsOfLayer]
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Load the routed experts among the weights to their places; yield all others.

    layers: those of this rank, by their number in the model. A layer that serves is opened for the first tensor that it
    gets, and closed at the end, whatever that is; one that was open is the engine's to close. Of a whole checkpoint's load,
    experts in the host's memory are closed as soon as the last of their layer is there.
    """
    names = expert_names(config)
    opened: dict[int, ExpertsOfLayer] = {}
    loads: dict[ExpertKind, _Load | None] = {}
    missing: dict[int, int] = {}
    repacking = _Repacking()

    def load_of(kind: ExpertKind) -> _Load | None:
        layer = layers.get(kind.layer)
        if layer is None or kind.part not in _PARTS:
            return None
        if layer.open():
            opened[kind.layer] = layer
        missing.setdefault(kind.layer, _TENSORS_OF_EXPERT * (num_experts_under_way() or 0))
        by_engine = _by_engine(kind, layer)
        return by_engine if layer.places is None else _by_copy(kind, layer.places, by_engine) or by_engine

    try:
        for name, tensor in weights:
            found = names.expert_tensor(name)
            if found is None:
                yield name, tensor
                continue
            kind, expert = found
            if kind not in loads:
                loads[kind] = load_of(kind)
            load = loads[kind]
            if load is None:
                continue
            load(tensor, expert)
            missing[kind.layer] -= 1
            if missing[kind.layer] == 0:
                loads = {other: load for other, load in loads.items() if other.layer != kind.layer}
                if layers[kind.layer].experts.is_on_host:
                    repacking.begin(layers[kind.layer].experts)
        repacking.end()
    finally:
        repacking.stop()
        for layer in opened.values():
            layer.close()


def load_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: K26Config | None,
    layers: Mapping[int, ExpertsOfLayer],
    load_others: Callable[[Iterable[tuple[str, torch.Tensor]]], Loaded],
) -> Loaded:
    """Load a checkpoint or any part of it, what is no routed expert's by `load_others`, which is the engine's.

    config: of the published layout, without which no layers are the core's. Returns what `load_others` does.
    """
    if not layers:
        return load_others(weights)
    assert config is not None, "the core's experts are of the published layout"
    with closing(load_experts(weights, config, layers)) as others:
        return load_others(others)


def _by_copy(kind: ExpertKind, places: Places, otherwise: _Load) -> _Load | None:
    """A copy to each place; None where somebody else's loader is to be given the tensors, or they do not fit as they are.

    otherwise: loads a tensor that is not as the checkpoint has it.
    """
    shape, dim = kind.spec.shape, kind.spec.shard_dim
    assert dim is not None, "what is not cut has no place"
    length = shape[dim] // places.num_ranks
    start, is_cut = places.rank * length, places.num_ranks > 1
    part = tuple(length if index == dim else size for index, size in enumerate(shape))
    targets = [experts.place(kind.projection, kind.part) for experts in places.sets]
    if shape[dim] % places.num_ranks or any(target is None or target.shape[1:] != part for target in targets):
        return None
    slots = places.slots

    def load(tensor: torch.Tensor, expert: int) -> None:
        if tensor.shape != shape:
            otherwise(tensor, expert)
            return
        for number, index in slots(expert):
            source = tensor.narrow(dim, start, length) if is_cut else tensor
            targets[number].select(0, index).copy_(source)  # type: ignore[union-attr]

    return load


def _by_engine(kind: ExpertKind, layer: ExpertsOfLayer) -> _Load:
    weight, shard_id = _PROJECTIONS[kind.projection]
    parameter_name = f"{weight}_weight_{kind.part}"
    loader_name = f"experts.{parameter_name}"

    def load(tensor: torch.Tensor, expert: int) -> None:
        parameter: Any = layer.module._parameters[parameter_name]
        for number in layer.physical_ids(expert):
            parameter.weight_loader(parameter, tensor, loader_name, shard_id=shard_id, expert_id=number)

    return load
