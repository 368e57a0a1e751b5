"""Parse the names of the routed experts' tensors, which are 99 of 100 names of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from k26_plugins.common.checkpoint.table import TensorSpec, expert_name, tensor_table
from k26_plugins.common.model.config import K26Config


@dataclass(frozen=True, slots=True, eq=False)
class ExpertKind:
    """A tensor that each routed expert of a layer has: one projection's packed weights, scales or shape.

    Only one object exists for each kind, so that it is compared and hashed quickly, by identity.
    """

    layer: int
    projection: str
    """gate, up or down."""
    part: str
    """packed, scale or shape."""
    spec: TensorSpec
    """The entry of expert 0 in the table: shape, dtype and shard dimension are the same for all experts."""


class ExpertNames:
    """Looks up tensor names in small dictionaries, because creating a table of all names takes 0.7 s."""

    def __init__(self, config: K26Config) -> None:
        text = config.text
        layers = range(text.first_k_dense_replace, text.num_hidden_layers)
        self._experts = {str(expert): expert for expert in range(text.n_routed_experts)}
        self._others = tensor_table(config, experts=0)
        firsts = tensor_table(config, experts=1)
        # Keyed by the part of the name before the expert's number, then by the part after it.
        self._kinds: dict[str, dict[str, ExpertKind]] = {}
        for layer in layers:
            for projection in ("gate", "up", "down"):
                for part in ("packed", "scale", "shape"):
                    name = expert_name(layer, 0, projection, part)
                    before, _, behind = name.partition(".experts.0.")
                    self._kinds.setdefault(before, {})[behind] = ExpertKind(layer, projection, part, firsts[name])
        num_kinds = sum(map(len, self._kinds.values()))
        self.num_tensors = len(self._others) + num_kinds * text.n_routed_experts
        self._last: tuple[str, tuple[ExpertKind, int] | None] = ("", None)

    def expert_tensor(self, name: str) -> tuple[ExpertKind, int] | None:
        """Return the kind and the expert's number of the tensor `name`, or None if it belongs to no routed expert."""
        # Each name is looked up twice in a row: for the accounting and for the loading.
        last, found = self._last
        if last is not name:
            found = self._taken_apart(name)
            self._last = name, found
        return found

    def _taken_apart(self, name: str) -> tuple[ExpertKind, int] | None:
        before, _, rest = name.partition(".experts.")
        kinds = self._kinds.get(before)
        if kinds is None:
            return None
        number, _, behind = rest.partition(".")
        kind, expert = kinds.get(behind), self._experts.get(number)
        return None if kind is None or expert is None else (kind, expert)

    def spec(self, name: str) -> TensorSpec | None:
        """Return the entry of `name` in the table, or None if the checkpoint has no such tensor."""
        found = self.expert_tensor(name)
        return self._others.get(name) if found is None else found[0].spec


@cache
def expert_names(config: K26Config) -> ExpertNames:
    """Return the names for a configuration, created once.

    The accounting and the loading parse the same names, and an update of the weights may come in hundreds of parts.
    """
    return ExpertNames(config)
