"""Load routed experts into the layers' parameters with one look-up and one copy for each tensor.

The engines' loaders compare the name of each of the 208,550 tensors with over a thousand patterns, which takes 250 µs a
tensor, and an engine's weight loader of a parameter finds the tensor's place anew each time, which takes 10 to 25 µs.
They also repack no layer before the last one is loaded. Here experts in host memory are repacked layer by layer, while
the next layer is read.
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

# For each projection: how its parameter's name begins, and the projection's shard id in the engines' weight loaders.
_PROJECTIONS = {"gate": ("w13", "w1"), "up": ("w13", "w3"), "down": ("w2", "w2")}
# A `weight_shape` tensor is not loaded, because it says nothing that the configuration does not say.
_PARTS = ("packed", "scale")
_TENSORS_OF_EXPERT = len(_PROJECTIONS) * len(_PARTS)

Loaded = TypeVar("Loaded")
_Load = Callable[[torch.Tensor, int], None]
"""A function that loads a tensor of one kind, given the tensor and the number of its expert in the checkpoint."""


class Places(NamedTuple):
    """The places of a layer's experts on this rank, so that they can be loaded without the engine's weight loaders."""

    sets: Sequence[LayerExperts]
    """The layer's experts on this rank: one set, or in a hybrid run one on the device and one in host memory."""
    slots: Callable[[int], Iterable[tuple[int, int]]]
    """Returns (index of the set, slot in it) for each copy of a checkpoint's expert that this rank holds; empty if only
    other ranks hold it."""
    rank: int
    """This rank's number in the tensor parallelism that cuts each expert."""
    num_ranks: int
    """Size of that tensor parallelism."""


class ExpertsOfLayer(NamedTuple):
    """A layer of an engine's model, with what must be known to load its experts."""

    module: torch.nn.Module
    """The module whose parameters are loaded."""
    experts: LayerExperts
    """The layer's experts that may be in host memory."""
    open: Callable[[], bool]
    """Makes the parameters ready to be loaded; returns whether they were not."""
    close: Callable[[], object]
    """Gives the loaded parameters to the backend."""
    physical_ids: Callable[[int], Iterable[int]]
    """Returns the ids under which the engine's weight loader knows an expert of the checkpoint."""
    is_local: Callable[[int], bool]
    """Returns whether this rank keeps an expert of the checkpoint, or its part of the expert."""
    places: Places | None = None
    """None if only the engine's weight loaders know the places."""


class _Repacking:
    """A thread that closes layers, one after another, while other layers are loaded."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._begun: list[Future[bool]] = []

    def begin(self, experts: LayerExperts) -> None:
        """Close a layer's experts on the thread. Raises the error of an earlier layer that could not be closed."""
        if self._thread is None:
            # An engine pins the thread that loads to one core, and a thread started from there would inherit this.
            self._thread = ThreadPoolExecutor(1, "k26-repack", _use, (allowed_cpus(),))
        for one in self._begun:
            if one.done():
                one.result()
        self._begun.append(self._thread.submit(experts.close))

    def end(self) -> None:
        """Wait until all layers are closed. Raises the error of the first one that could not be closed."""
        for one in self._begun:
            one.result()

    def stop(self) -> None:
        """Wait for the layer that is being closed, and cancel the others."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def _use(cpus: set[int]) -> None:
    with suppress(OSError):  # a container may forbid it
        os.sched_setaffinity(0, cpus)


def is_needed(layers: Mapping[int, ExpertsOfLayer], config: K26Config) -> Callable[[ExpertKind, int], bool] | None:
    """Return a function that says whether this rank keeps any of an expert's tensor, or None if it keeps them all."""
    text = config.text
    if len(layers) == text.num_hidden_layers - text.first_k_dense_replace and all(
        layer.is_local(expert) for layer in layers.values() for expert in range(text.n_routed_experts)
    ):
        return None
    return lambda kind, expert: kind.layer in layers and layers[kind.layer].is_local(expert)


def load_experts(
    weights: Iterable[tuple[str, torch.Tensor]], config: K26Config, layers: Mapping[int, ExpertsOfLayer]
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Load the routed experts among the weights into the layers' parameters, and yield all other weights.

    weights: names and tensors in the checkpoint's shapes and dtypes (`tensor_table`), on any device. layers: this
    rank's layers, by their number in the model. A layer that serves is opened at its first tensor and closed at the
    end, even if the loading fails; a layer that was open already is left to the engine to close. When a whole
    checkpoint is loaded, experts in host memory are repacked as soon as the last tensor of their layer has arrived.
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
    """Load a checkpoint or a part of it: routed experts into `layers`, other weights by the engine's `load_others`.

    config: the model's, which is needed if there are layers; only a checkpoint of the published layout has layers with
    the core's experts. Returns what `load_others` returns.
    """
    if not layers:
        return load_others(weights)
    assert config is not None, "the core's experts are of the published layout"
    with closing(load_experts(weights, config, layers)) as others:
        return load_others(others)


def _by_copy(kind: ExpertKind, places: Places, otherwise: _Load) -> _Load | None:
    """Return a function that copies a tensor to each of its places.

    Returns None if someone replaced the parameter's weight loader, which must then get the tensors, or if the tensors
    do not fit the parameters as they are. otherwise: loads a tensor whose shape is not the one in the checkpoint.
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
