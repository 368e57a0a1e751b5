"""Routed experts on their way from a loader to the layers' parameters: one look-up for each tensor.

The engines' loaders compare the name of each of 208,550 tensors with over a thousand patterns, 250 µs each. And they repack
the layers when the last of them is loaded; experts in the host's memory are repacked here, layer by layer, while the next is
read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from k26_plugins.common.checkpoint.engine_files import num_experts_under_way
from k26_plugins.common.checkpoint.expert_names import ExpertTensor, expert_names
from k26_plugins.common.config import K26Config
from k26_plugins.common.cores import allowed_cpus
from k26_plugins.common.experts.parameters import LayerExperts

# Of a projection: the parameter's beginning, and its name in the engines' loaders.
_PROJECTIONS = {"gate": ("w13", "w1"), "up": ("w13", "w3"), "down": ("w2", "w2")}
# A `weight_shape` has no place: it says nothing that the configuration does not.
_PLACES = {
    (projection, part): (f"{weight}_weight_{part}", f"experts.{weight}_weight_{part}", shard_id)
    for projection, (weight, shard_id) in _PROJECTIONS.items()
    for part in ("packed", "scale")
}


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


def is_needed(layers: Mapping[int, ExpertsOfLayer]) -> Callable[[ExpertTensor], bool]:
    """Whether this rank keeps any of a tensor."""
    return lambda found: found.layer in layers and layers[found.layer].is_local(found.expert)


def load_experts(
    weights: Iterable[tuple[str, torch.Tensor]], config: K26Config, layers: Mapping[int, ExpertsOfLayer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load the routed experts among the weights, by the engine's loader of each parameter; yield all others.

    layers: those of this rank, by their number in the model. A layer that serves is opened for the first tensor that it
    gets, and closed at the end, whatever that is; one that was open is the engine's to close. Of a whole checkpoint's load,
    experts in the host's memory are closed as soon as the last of their layer is there.
    """
    names = expert_names(config)
    opened: dict[int, ExpertsOfLayer] = {}
    loaded: Counter[int] = Counter()
    repacking = _Repacking()
    try:
        for name, tensor in weights:
            found = names.expert_tensor(name)
            if found is None:
                yield name, tensor
                continue
            layer, place = layers.get(found.layer), _PLACES.get((found.projection, found.part))
            if layer is None or place is None:
                continue
            if layer.open():
                opened[found.layer] = layer
            parameter_name, loader_name, shard_id = place
            parameter: Any = layer.module._parameters[parameter_name]
            for expert in layer.physical_ids(found.expert):
                parameter.weight_loader(parameter, tensor, loader_name, shard_id=shard_id, expert_id=expert)
            loaded[found.layer] += 1
            if loaded[found.layer] == len(_PLACES) * (num_experts_under_way() or 0) and layer.experts.is_on_host:
                repacking.begin(layer.experts)
        repacking.end()
    finally:
        repacking.stop()
        for layer in opened.values():
            layer.close()
