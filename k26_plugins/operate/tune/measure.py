"""Measure each kernel on each batch: its time, and its error against the plain product in float32."""

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

# How many of a batch's tokens are compared, evenly spaced. They are few because for each of them every expert that the
# token chose has to be dequantized.
COMPARED = 8
# Number of searches for tiles: one for each of the two GEMMs of each of five kernel configs.
SEARCHES = 10


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: batches of which sizes in tokens, which routings, and how long tiles are searched.

    tile_seconds: for all searches together; 0 keeps the present tiles.
    """

    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    tile_seconds: float


FULL = Effort(tuple(2**power for power in range(15)), ("uniform", "zipf"), 240.0)
QUICK = Effort((1, 8, 64, 512, 4096), ("uniform",), 0.0)


def random_weights(layer: Layer, device: torch.device) -> ExpertWeights:
    """Return experts of the rank's sizes on a device, as `random_experts` draws them."""
    return random_experts(layer.num_experts, layer.hidden_size, layer.intermediate_size, device)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurement of one layer on one GPU.

    on_step: called once for each of `steps` with its name: after each search for tiles, and before each timing.
    """

    layer: Layer
    weights: ExpertWeights
    peers: Mapping[str, Peer]
    effort: Effort
    clock: Clock
    on_step: Callable[[str], object] = lambda step: None

    @property
    def steps(self) -> int:
        """How often `on_step` is called in a run."""
        batches = len(self.effort.tokens) * len(self.effort.routings)
        return (SEARCHES if self.effort.tile_seconds else 0) + batches * (1 + len(self.peers))

    def run(self) -> tuple[dict[str, Any], tuple[Timing, ...]]:
        """Return the tiles of the core's kernels, and the timings of all kernels.

        Kernels are loaded and timed one after the other, because each of them has its own copy of the weights.
        """
        tiles, ours = self._ours()
        timings = list(self._timed(OURS, ours))
        del ours
        for name, peer in self.peers.items():
            run: Run | str
            try:
                run = peer(self.weights)
            except NotHereError as reason:
                run = str(reason)
            except Exception as error:  # the engine's version or the GPU is not one that the peer was written for
                run = _short(error)
            timings += self._timed(name, run)
            del run
        return tiles, tuple(timings)

    def _ours(self) -> tuple[dict[str, Any], Run]:
        """Load the core's kernels, search their tiles if there is time for it, and return the tiles and the kernels."""
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
        """Yield the timing of a kernel on each batch. A string in the kernel's place says why the kernel cannot run."""
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
        # Engines capture decode in CUDA graphs, so batches of up to 512 tokens are timed in one.
        tokens = len(first.hidden_states)
        seconds = self.clock(
            lambda: [run(b.hidden_states, b.topk_weights, b.topk_ids, local) for b in batches], tokens <= 512
        )
        return Timing(name, routing, tokens, seconds / len(batches) * 1e3, error)

    def _error(self, batch: Batch, result: torch.Tensor, local: torch.Tensor | None) -> float:
        """Return ‖result − exact‖ / ‖exact‖ over COMPARED tokens of the batch; infinity if the result is not finite."""
        tokens = len(batch.hidden_states)
        rows = torch.linspace(0, tokens - 1, min(COMPARED, tokens)).long().to(result.device)
        ids, weights = batch.topk_ids[rows], batch.topk_weights[rows]
        x = batch.hidden_states[rows].float()
        exact = reference_experts(x, ids, weights, self.weights.expert, self.layer.num_experts, local)
        error = ((result[rows].float() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        return error if error == error else float("inf")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:120]
