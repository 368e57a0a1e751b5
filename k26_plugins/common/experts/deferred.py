"""Defer some of the CPU's experts in a hybrid run: their sum is added one layer later than the model has it.

This is KTransformers' way to keep the CPU busy while the device computes the next layer's attention: each token's least
weighted experts, as far as they live on the CPU, start once the CPU's other experts are done, and their sum joins the
output of the next layer's experts. This changes the model's answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Result = Callable[[], torch.Tensor]
"""A function that waits for a routed sum `[num_tokens, hidden_size]` and returns it, on the device or on the host."""


class Deferral:
    """The number of experts to defer, and the deferred sum that one layer left to the next.

    All layers of a process share one object, since they run one after the other.
    """

    def __init__(self, per_token: int, last_layer: int) -> None:
        """per_token: how many of each token's experts, the least weighted ones, may be deferred. last_layer: the number
        of the model's last layer, which defers no experts because no layer follows it."""
        self.per_token, self.last_layer = per_token, last_layer
        self._left: tuple[int, Result] | None = None

    def split(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two copies of `topk_ids`: with −1 for each deferred expert, and with −1 for each other one.

        topk_ids: integers `[num_tokens, top_k]`. topk_weights: floats `[num_tokens, top_k]`. Both are on one device.
        The copies have the shape, dtype and device of `topk_ids`.
        """
        count = 0 if layer == self.last_layer else min(self.per_token, topk_ids.shape[1])
        least = topk_weights.topk(count, largest=False).indices
        is_deferred = torch.zeros_like(topk_ids, dtype=torch.bool).scatter_(1, least, True)
        return topk_ids.masked_fill(is_deferred, -1), topk_ids.masked_fill(~is_deferred, -1)

    def leave(self, layer: int, result: Result) -> None:
        """Keep the deferred experts' sum of `layer` for the layer that follows."""
        self._left = (layer, result)

    def take(self, layer: int) -> Result | None:
        """Return what the layer before this one left, or None.

        What any other layer left comes from a step that ended early, and is dropped.
        """
        left, self._left = self._left, None
        return left[1] if left is not None and left[0] == layer - 1 else None
