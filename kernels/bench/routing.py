"""The layers and the choices of experts that the benchmarks run: even, skewed, and requests that share a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from k26_kernels import Shape

GLOBAL_EXPERTS = 384
TOP_K = 8
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Layer:
    """The part of a layer on one rank."""

    name: str
    shape: Shape

    @property
    def expert_bytes(self) -> int:
        """Weights and scales of an expert here: 4.5 bits a weight."""
        return 3 * self.shape.hidden_size * self.shape.intermediate_size * 9 // 16

    def flops(self, slots: int) -> int:
        return 6 * slots * self.shape.hidden_size * self.shape.intermediate_size


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("whole", Shape(7168, 2048, 384)),
        Layer("tp8", Shape(7168, 256, 384)),
        Layer("ep8", Shape(7168, 2048, 48)),
    )
}


def choose(kind: str, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """int32 `[num_tokens, 8]`, different experts in a row.

    kind: `uniform`; `zipf`, an expert of rank r with a chance of 1 / r; `prefix`, the tokens of 300 requests of which
    each token of a shared prefix chose alike, so that few different rows occur.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "prefix":
        rows = choose("uniform", max(1, num_tokens // 300), seed)
        return rows[torch.arange(num_tokens) % len(rows)]
    weights = torch.ones(GLOBAL_EXPERTS)
    if kind == "zipf":
        weights = 1 / torch.arange(1, GLOBAL_EXPERTS + 1)
        weights = weights[torch.randperm(GLOBAL_EXPERTS, generator=generator)]
    chosen = torch.multinomial(weights.expand(num_tokens, -1), TOP_K, generator=generator)
    return chosen.to(torch.int32)


def expert_map(layer: Layer) -> torch.Tensor | None:
    """int32 `[384]` where the rank holds a part of the experts: the first ones."""
    if layer.shape.num_experts == GLOBAL_EXPERTS:
        return None
    local = torch.full((GLOBAL_EXPERTS,), -1, dtype=torch.int32)
    local[: layer.shape.num_experts] = torch.arange(layer.shape.num_experts, dtype=torch.int32)
    return local


def slots_here(ids: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The local experts of the slots that have one, flat."""
    return ids[ids < layer.shape.num_experts].flatten()
