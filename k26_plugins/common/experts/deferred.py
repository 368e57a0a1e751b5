"""Deferred experts of a hybrid run: what the CPU adds one layer later than the model has it.

KTransformers' way to keep the CPU busy while the device computes the next layer's attention: of each token's experts the
least weighted ones, where they live on the CPU, are started once the others are done, and their sum joins the output of the
next layer's experts. Answers change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Result = Callable[[], torch.Tensor]
"""Waits for a routed sum, and gives it on the device."""


class Deferral:
    """How many experts are deferred, and what one layer left to the next. One for all layers of a process, which run one
    after the other."""

    def __init__(self, per_token: int, last_layer: int) -> None:
        """per_token: of each token's experts so many of the least weighted may be deferred. last_layer: its number; no
        layer follows it, so it defers none."""
        self.per_token, self.last_layer = per_token, last_layer
        self._left: tuple[int, Result] | None = None

    def split(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`topk_ids` twice, `[num_tokens, top_k]`: with −1 in the places of the deferred, and with −1 in all others."""
        count = 0 if layer == self.last_layer else min(self.per_token, topk_ids.shape[1])
        least = topk_weights.topk(count, largest=False).indices
        is_deferred = torch.zeros_like(topk_ids, dtype=torch.bool).scatter_(1, least, True)
        return topk_ids.masked_fill(is_deferred, -1), topk_ids.masked_fill(~is_deferred, -1)

    def leave(self, layer: int, result: Result) -> None:
        """To the layer that follows."""
        self._left = (layer, result)

    def take(self, layer: int) -> Result | None:
        """What the layer before this one left. Anything else is of a step that ended early, and is dropped."""
        left, self._left = self._left, None
        return left[1] if left is not None and left[0] == layer - 1 else None
