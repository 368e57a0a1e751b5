"""Place the experts of a hybrid run dynamically: experts that are used much move to the device, and others make room.

Each rank moves experts independently, because the sum over ranks does not depend on where an expert's part is computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from k26_plugins.common import metrics
from k26_plugins.common.experts.hybrid import HybridExperts

# Seconds between two looks at the counts, and the seconds for moving experts after each look: at most 1 % of the time.
INTERVAL = 10.0
BUDGET = 0.1
# Mean number of uses of a layer's experts below which the layer's counts are too small to move an expert.
EVIDENCE = 8.0
# An expert moves if it is used this many times as often as the one whose place it takes; less may be chance.
GAIN = 1.5


@dataclass(slots=True)
class _Layer:
    experts: HybridExperts
    seen: torch.Tensor
    """The counts at the last look."""
    recent: torch.Tensor
    """float64 `[num_experts]`: uses, where those of each look count half as much as those of the next one."""


@dataclass(slots=True)
class Uses:
    """The uses of the experts in all layers of a process, from which the device's hit rate and the moves follow."""

    logger: logging.Logger
    moves: bool
    """Whether experts move; they are counted in any case."""
    clock: Callable[[], float] = time.monotonic
    _layers: list[_Layer] = field(default_factory=list)
    _last: float | None = None
    _next: int = 0
    """Index of the layer where the next search for misplaced experts begins."""

    def add(self, experts: HybridExperts) -> None:
        """Watch a layer from now on; uses that were counted before do not move its experts."""
        counts = experts.counts
        self._layers.append(_Layer(experts, counts.clone(), torch.zeros(len(counts), dtype=torch.float64)))

    def step(self) -> None:
        """Look at the counts and move experts if it is time.

        The thread that starts the engine's steps calls this after a step's answer.
        """
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
        """Yield pairs of experts to exchange until none is misplaced, from the layer on where the last search ended."""
        for _ in range(len(self._layers)):
            layer = self._layers[self._next]
            while pair := _pair(layer):
                yield layer.experts, pair
            self._next = (self._next + 1) % len(self._layers)


def _pair(layer: _Layer) -> tuple[int, int] | None:
    """Return the expert that should leave the device and the one that should take its place, or None if none should."""
    recent, on_host = layer.recent, layer.experts.host_map >= 0
    if recent.sum() < EVIDENCE * len(recent) or on_host.all():
        return None
    leaves = int(torch.where(on_host, torch.inf, recent).argmin())
    comes = int(torch.where(on_host, recent, -1.0).argmax())
    return (leaves, comes) if recent[comes] > GAIN * recent[leaves] + 1 else None
