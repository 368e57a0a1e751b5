"""Choose which experts of a layer live on the device in a hybrid run: the first, or those that a workload uses most."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from k26_plugins.common.model.config import K26Config

PROFILE_FILE = "k26_expert_profile.json"


class PlacementError(ValueError):
    """Raised for a profile or a number of experts that does not fit the model. The message names it and the remedy."""


@dataclass(frozen=True)
class LayerPlacement:
    """The global ids of a layer's experts on the device and on the host, each in the order in which their weights lie."""

    device_ids: tuple[int, ...]
    host_ids: tuple[int, ...]

    def device_map(self) -> torch.Tensor:
        """Return int32 `[num_experts]`: the index on the device for each global id, or −1 for an expert of the host."""
        return self._map(self.device_ids)

    def host_map(self) -> torch.Tensor:
        """Return int32 `[num_experts]`: the index on the host for each global id, or −1 for an expert of the device."""
        return self._map(self.host_ids)

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """For each global id: 0 for the device or 1 for the host, and the index there."""
        sides = (self.device_ids, self.host_ids)
        return {expert: (side, index) for side, ids in enumerate(sides) for index, expert in enumerate(ids)}

    def exchanged(self, leaves: int, comes: int) -> LayerPlacement:
        """Return the placement with `leaves`, which is on the device, and `comes`, which is on the host, exchanged."""
        other = {leaves: comes, comes: leaves}
        device_ids, host_ids = (tuple(other.get(one, one) for one in ids) for ids in (self.device_ids, self.host_ids))
        return LayerPlacement(device_ids, host_ids)

    def _map(self, ids: tuple[int, ...]) -> torch.Tensor:
        out = torch.full((len(self.device_ids) + len(self.host_ids),), -1, dtype=torch.int32)
        out[list(ids)] = torch.arange(len(ids), dtype=torch.int32)
        return out


@dataclass(frozen=True, slots=True)
class Profile:
    """The number of times that a workload's tokens chose each expert.

    counts: `[num_hidden_layers][n_routed_experts]`, zeros for a layer that has no experts.
    """

    num_tokens: int
    counts: list[list[int]]

    def save(self, path: Path) -> None:
        """Write the profile as JSON, which `load` reads. Raises OSError."""
        content = {"num_tokens": self.num_tokens, "counts": self.counts}
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, config: K26Config) -> Profile:
        """Read a profile. Raises PlacementError if the file is damaged, or counts the experts of another model."""
        text = config.text
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            profile = cls(int(content["num_tokens"]), [[int(n) for n in layer] for layer in content["counts"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlacementError(f"{path} is no expert profile ({error}): make it again with `k26 profile`.") from error
        found = (len(profile.counts), {len(layer) for layer in profile.counts})
        if found != (text.num_hidden_layers, {text.n_routed_experts}):
            raise PlacementError(
                f"{path} counts {found[1]} experts in {found[0]} layers, this model has {text.n_routed_experts} in "
                f"{text.num_hidden_layers}: make it again with `k26 profile`."
            )
        return profile

    def hit_rate(self, num_device_experts: int) -> float:
        """Return the share of this workload's expert uses that the device answers if `place` is given these counts."""
        return self._share([sorted(layer, reverse=True)[:num_device_experts] for layer in self.counts])

    def hit_rate_of_first(self, num_device_experts: int) -> float:
        """Return the share of this workload's expert uses that the device answers if `place` is given no counts."""
        return self._share([layer[:num_device_experts] for layer in self.counts])

    def _share(self, chosen: list[list[int]]) -> float:
        total = sum(map(sum, self.counts))
        return sum(map(sum, chosen)) / total if total else 0.0


def place(num_experts: int, num_device_experts: int, counts: list[int] | None = None) -> LayerPlacement:
    """Put `num_device_experts` of a layer's experts on the device: the most used, or without counts the first.

    counts: uses of each expert of the layer. Raises PlacementError if no expert would be left for the host.
    """
    if not 0 <= num_device_experts < num_experts:
        raise PlacementError(
            f"{num_device_experts} of {num_experts} experts on the device is no hybrid run: choose 0 to {num_experts - 1}."
        )
    ranked = sorted(range(num_experts), key=lambda expert: (-counts[expert] if counts else 0, expert))
    chosen = set(ranked[:num_device_experts])
    return LayerPlacement(tuple(sorted(chosen)), tuple(expert for expert in range(num_experts) if expert not in chosen))
