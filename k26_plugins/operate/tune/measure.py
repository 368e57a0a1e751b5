"""Each kernel on each batch: its time, and its error against the plain product in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from k26_kernels import KernelExperts, fused_experts, use_configs
from k26_kernels.config import kernel_configs

from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.outcome import OURS, Timing
from k26_plugins.common.experts.peer import NotHereError, Peer, Run
from k26_plugins.common.experts.reference import reference_experts
from k26_plugins.operate.random_experts import random_experts
from k26_plugins.operate.tune.clock import Clock
from k26_plugins.operate.tune.routing import Batch, Layer
from k26_plugins.operate.tune.tiles import fastest_tiles

# Tokens of a batch whose result is compared, evenly spaced: each needs as many experts dequantized as it chose.
COMPARED = 8
# Searches for tiles: each config's two GEMMs.
SEARCHES = 10


@dataclass(frozen=True, slots=True)
class Effort:
    """What is measured. tile_seconds: of the search for tiles, 0 for the present ones."""

    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    tile_seconds: float


FULL = Effort(tuple(2**power for power in range(15)), ("uniform", "zipf"), 240.0)
QUICK = Effort((1, 8, 64, 512, 4096), ("uniform",), 0.0)


def random_weights(layer: Layer, device: torch.device) -> ExpertWeights:
    """Experts of the rank's sizes, as `random_experts` draws them."""
    return random_experts(layer.num_experts, layer.hidden_size, layer.intermediate_size, device)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One layer, one GPU. on_step: told what was done, once for each of `steps`."""

    layer: Layer
    weights: ExpertWeights
    peers: Mapping[str, Peer]
    effort: Effort
    clock: Clock
    on_step: Callable[[str], object] = lambda step: None

    @property
    def steps(self) -> int:
        batches = len(self.effort.tokens) * len(self.effort.routings)
        return (SEARCHES if self.effort.tile_seconds else 0) + batches * (1 + len(self.peers))

    def run(self) -> tuple[dict[str, Any], tuple[Timing, ...]]:
        """The tiles of ours, and the timings of all, one kernel after the other: each has weights of its own."""
        tiles, ours = self._ours()
        timings = list(self._timed(OURS, ours))
        del ours
        for name, peer in self.peers.items():
            run: Run | str
            try:
                run = peer(self.weights)
            except NotHereError as reason:
                run = str(reason)
            except Exception as error:  # another version than the one it was written for, or another GPU
                run = _short(error)
            timings += self._timed(name, run)
            del run
        return tiles, tuple(timings)

    def _ours(self) -> tuple[dict[str, Any], Run]:
        copy = self.weights.copy_of(list(range(self.weights.num_experts)))
        experts = KernelExperts.from_checkpoint(*copy.parts())
        found = kernel_configs(experts.device, experts.shape)
        if self.effort.tile_seconds:
            searched = (self.clock, self.effort.tile_seconds, lambda what: self.on_step(f"tiles for {what}"))
            found = fastest_tiles(experts, self.layer, *searched)
        tiles = {name: asdict(config) for name, config in found.items()}
        use_configs(experts.device, experts.shape, tiles)
        return tiles, lambda x, weights, ids, local: fused_experts(x, experts, ids, weights, expert_map=local)

    def _timed(self, name: str, run: Run | str) -> Iterator[Timing]:
        device = self.weights.device
        local = self.layer.expert_map(device)
        for routing in self.effort.routings:
            for tokens in self.effort.tokens:
                self.on_step(f"{name}, {tokens} tokens, {routing}")
                if isinstance(run, str):
                    yield Timing(name, routing, tokens, note=run)
                    continue
                batches = self.layer.batches(routing, tokens, device)
                try:
                    yield self._one(name, run, routing, batches, local)
                except Exception as error:  # a kernel may fail in any way; it then has a row that says so
                    yield Timing(name, routing, tokens, note=_short(error))

    def _one(self, name: str, run: Run, routing: str, batches: Sequence[Batch], local: torch.Tensor | None) -> Timing:
        first = batches[0]
        result = run(first.hidden_states, first.topk_weights, first.topk_ids, local)
        error = self._error(first, result, local)
        # What an engine captures in CUDA graphs, its decoding, is timed in one.
        tokens = len(first.hidden_states)
        seconds = self.clock(
            lambda: [run(b.hidden_states, b.topk_weights, b.topk_ids, local) for b in batches], tokens <= 512
        )
        return Timing(name, routing, tokens, seconds / len(batches) * 1e3, error)

    def _error(self, batch: Batch, result: torch.Tensor, local: torch.Tensor | None) -> float:
        """‖result − exact‖ / ‖exact‖ over some tokens; infinite for what is not finite."""
        tokens = len(batch.hidden_states)
        rows = torch.linspace(0, tokens - 1, min(COMPARED, tokens)).long().to(result.device)
        ids, weights = batch.topk_ids[rows], batch.topk_weights[rows]
        x = batch.hidden_states[rows].float()
        exact = reference_experts(x, ids, weights, self.weights.expert, self.layer.num_experts, local)
        error = ((result[rows].float() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        return error if error == error else float("inf")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:120]
