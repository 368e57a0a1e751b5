"""Dynamic placement of a hybrid run: experts that are used much move to the device, those that gave their place to the host.

Each rank moves for itself. Where an expert's part is computed changes nothing in the sum over ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from k26_plugins.common import metrics
from k26_plugins.common.experts.hybrid import HybridExperts

# Seconds between two looks at the counts, and of work on moving after each: 1 % of the time at most.
INTERVAL = 10.0
BUDGET = 0.1
# Uses of a layer's experts, on average, before its counts say anything.
EVIDENCE = 8.0
# An expert moves where it is used so many times as often as the one whose place it takes: counts of equals differ too.
GAIN = 1.5


@dataclass(slots=True)
class _Layer:
    experts: HybridExperts
    seen: torch.Tensor
    """The counts at the last look."""
    recent: torch.Tensor
    """float64 `[num_experts]`: uses, each look's worth half of the next one's."""


@dataclass(slots=True)
class Uses:
    """How many uses of the experts of all layers of a process the device answers, and which experts should move."""

    logger: logging.Logger
    moves: bool
    """Whether experts move; they are counted in any case."""
    clock: Callable[[], float] = time.monotonic
    _layers: list[_Layer] = field(default_factory=list)
    _last: float | None = None
    _next: int = 0
    """The layer where the next move is looked for."""

    def add(self, experts: HybridExperts) -> None:
        """Watch a layer: what was counted before is no reason to move its experts."""
        counts = experts.counts
        self._layers.append(_Layer(experts, counts.clone(), torch.zeros(len(counts), dtype=torch.float64)))

    def step(self) -> None:
        """After a step's answer, by the thread that starts the steps."""
        now = self.clock()
        if self._last is None:
            self._last = now
        if now - self._last < INTERVAL or not self._layers:
            return
        self._look()
        if self.moves:
            self._move(self.clock() + BUDGET)
        self._last = self.clock()

    def _look(self) -> None:
        hits = total = 0
        for layer in self._layers:
            counts = layer.experts.counts.clone()
            new = counts - layer.seen
            layer.seen = counts
            layer.recent.mul_(0.5).add_(new)
            total += int(new.sum())
            hits += int(new[layer.experts.host_map < 0].sum())
        if total:
            metrics.hybrid_hit_rate(hits / total)

    def _move(self, until: float) -> None:
        device = self._layers[0].experts.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moved = 0
        for experts, pair in self._misplaced():
            if self.clock() >= until:
                break
            experts.exchange(*pair)
            moved += 1
        if moved:
            self.logger.info("k26-plugins: %d experts that are used more took a place on %s.", moved, device)

    def _misplaced(self) -> Iterator[tuple[HybridExperts, tuple[int, int]]]:
        """Pairs to be exchanged, from the layer on where the last look ended, until all experts are in their place."""
        for _ in range(len(self._layers)):
            layer = self._layers[self._next]
            while pair := _pair(layer):
                yield layer.experts, pair
            self._next = (self._next + 1) % len(self._layers)


def _pair(layer: _Layer) -> tuple[int, int] | None:
    """The expert that should leave the device, and the one that should come; None where all are in their place."""
    recent, on_host = layer.recent, layer.experts.host_map >= 0
    if recent.sum() < EVIDENCE * len(recent) or on_host.all():
        return None
    leaves = int(torch.where(on_host, torch.inf, recent).argmin())
    comes = int(torch.where(on_host, recent, -1.0).argmax())
    return (leaves, comes) if recent[comes] > GAIN * recent[leaves] + 1 else None
