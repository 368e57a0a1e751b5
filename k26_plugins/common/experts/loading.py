"""Routed experts on their way from a loader to the layers' parameters: one look-up for each tensor.

The engines' loaders compare the name of each of 208,550 tensors with over a thousand patterns, 250 µs each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from k26_plugins.common.checkpoint.expert_names import expert_names
from k26_plugins.common.config import K26Config

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
    open: Callable[[], bool]
    """Prepares them for that; whether it had to."""
    close: Callable[[], object]
    physical_ids: Callable[[int], Iterable[int]]
    """The ids under which the engine's loader of a parameter knows an expert of the checkpoint."""


def load_experts(
    weights: Iterable[tuple[str, torch.Tensor]], config: K26Config, layers: Mapping[int, ExpertsOfLayer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load the routed experts among the weights, by the engine's loader of each parameter; yield all others.

    layers: those of this rank, by their number in the model. A layer that serves is opened for the first tensor that it
    gets, and closed at the end, whatever that is; one that was open is the engine's to close.
    """
    names = expert_names(config)
    opened: dict[int, ExpertsOfLayer] = {}
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
    finally:
        for layer in opened.values():
            layer.close()
