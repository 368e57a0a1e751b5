"""The names of the routed experts' tensors, taken apart: 99 of 100 names of a checkpoint."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from k26_plugins.common.checkpoint.table import TensorSpec, expert_name, tensor_table
from k26_plugins.common.config import K26Config


class ExpertTensor(NamedTuple):
    """A tensor of one routed expert."""

    layer: int
    expert: int
    projection: str
    """gate, up or down."""
    part: str
    """packed, scale or shape."""
    spec: TensorSpec
    """That of expert 0 in its layer: shape and dtype are the same for all."""


class ExpertNames:
    """Finds what a name stands for by two small dictionaries, where a table of all names takes 0.7 s to make."""

    def __init__(self, config: K26Config) -> None:
        text = config.text
        layers = range(text.first_k_dense_replace, text.num_hidden_layers)
        self._experts = {str(expert): expert for expert in range(text.n_routed_experts)}
        self._others = tensor_table(config, experts=0)
        firsts = tensor_table(config, experts=1)
        # What stands before and behind the expert's number.
        self._parts: dict[tuple[str, str], tuple[int, str, str, TensorSpec]] = {}
        for layer in layers:
            for projection in ("gate", "up", "down"):
                for part in ("packed", "scale", "shape"):
                    name = expert_name(layer, 0, projection, part)
                    before, _, behind = name.rpartition(".0.")
                    self._parts[before, behind] = (layer, projection, part, firsts[name])
        self.num_tensors = len(self._others) + len(self._parts) * text.n_routed_experts
        self._last: tuple[str, ExpertTensor | None] = ("", None)

    def expert_tensor(self, name: str) -> ExpertTensor | None:
        """What `name` stands for, None where it is no routed expert's."""
        # Who accounts for a tensor asks, and then who loads it.
        last, found = self._last
        if last is not name:
            found = self._taken_apart(name)
            self._last = name, found
        return found

    def _taken_apart(self, name: str) -> ExpertTensor | None:
        pieces = name.rsplit(".", 3)
        if len(pieces) != 4:
            return None
        before, number, projection, part = pieces
        expert = self._experts.get(number)
        found = self._parts.get((before, f"{projection}.{part}"))
        if found is None or expert is None:
            return None
        layer, projection, part, spec = found
        return ExpertTensor(layer, expert, projection, part, spec)

    def spec(self, name: str) -> TensorSpec | None:
        """Shape and dtype of the tensor `name`, None where the checkpoint has none of it."""
        found = self.expert_tensor(name)
        return self._others.get(name) if found is None else found.spec


@cache
def expert_names(config: K26Config) -> ExpertNames:
    """Kept: the accounting and the loading take the same names apart, and an update may come in hundreds of parts."""
    return ExpertNames(config)
