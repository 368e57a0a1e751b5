"""Routed experts on their way from a loader to the layers' parameters: one look-up for each tensor.

The engines' loaders compare the name of each of 208,550 tensors with over a thousand patterns, 250 µs each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from k26_plugins.common.checkpoint import expert_name
from k26_plugins.common.config import K26Config

# A projection's parameter, and its name in the engines' loaders.
_PROJECTIONS = {"gate": ("w13", "w1"), "up": ("w13", "w3"), "down": ("w2", "w2")}


class Place(NamedTuple):
    """Where a tensor of the checkpoint belongs."""

    layer: int
    expert: int
    parameter: str | None
    """None for a `weight_shape`, which has no place."""
    shard_id: str


class ExpertsOfLayer(NamedTuple):
    """What of a layer the loading needs from an engine."""

    module: torch.nn.Module
    """That whose parameters are loaded."""
    open: Callable[[], bool]
    """Prepares them for that; whether it had to."""
    close: Callable[[], object]
    physical_ids: Callable[[int], Iterable[int]]
    """The ids under which the engine's loader of a parameter knows an expert of the checkpoint."""


@cache
def expert_places(config: K26Config) -> Mapping[str, Place]:
    """Every tensor of the routed experts, by its name in the checkpoint.

    Kept: the published model's 207,360 take 0.7 s to list, and an update may come in hundreds of parts.
    """
    text = config.text
    return {
        expert_name(layer, expert, projection, part): Place(
            layer, expert, None if part == "shape" else f"{weight}_weight_{part}", shard_id
        )
        for layer in range(text.first_k_dense_replace, text.num_hidden_layers)
        for expert in range(text.n_routed_experts)
        for projection, (weight, shard_id) in _PROJECTIONS.items()
        for part in ("packed", "scale", "shape")
    }


def load_experts(
    weights: Iterable[tuple[str, torch.Tensor]], places: Mapping[str, Place], layers: Mapping[int, ExpertsOfLayer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Load the routed experts among the weights, by the engine's loader of each parameter; yield all others.

    layers: those of this rank, by their number in the model. A layer that serves is opened for the first tensor that it
    gets, and closed at the end, whatever that is; one that was open is the engine's to close.
    """
    opened: dict[int, ExpertsOfLayer] = {}
    try:
        for name, tensor in weights:
            place = places.get(name)
            if place is None:
                yield name, tensor
                continue
            layer = layers.get(place.layer)
            if layer is None or place.parameter is None:
                continue
            if layer.open():
                opened[place.layer] = layer
            parameter: Any = layer.module._parameters[place.parameter]
            for expert in layer.physical_ids(place.expert):
                parameter.weight_loader(
                    parameter, tensor, f"experts.{place.parameter}", shard_id=place.shard_id, expert_id=expert
                )
    finally:
        for layer in opened.values():
            layer.close()
