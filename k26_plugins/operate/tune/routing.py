"""A rank's part of a layer, and choices of experts to measure it with: even, skewed, and requests that share a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k26_plugins.common.model.config import TextConfig


@dataclass(frozen=True)
class Layer:
    """The routed experts of one layer on one rank: its sizes there, and of how many experts a token chooses."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    global_experts: int = 384
    top_k: int = 8

    @classmethod
    def of_rank(cls, text: TextConfig, tp: int, ep: int) -> Layer:
        """Each expert cut in `tp` parts, the experts dealt out to `ep` ranks. Raises ValueError where that leaves a rest."""
        intermediate_size, experts = text.moe_intermediate_size, text.n_routed_experts
        if intermediate_size % tp or experts % ep:
            raise ValueError(
                f"{experts} experts of {intermediate_size} rows cannot be dealt out to {ep} ranks and cut in {tp}: "
                "choose divisors."
            )
        name = "-".join(f"{word}{count}" for word, count in (("tp", tp), ("ep", ep)) if count > 1) or "whole"
        return cls(name, text.hidden_size, intermediate_size // tp, experts // ep, experts, text.num_experts_per_tok)

    @classmethod
    def of_shape(cls, shape: str) -> Layer:
        """A layer of a rank's sizes as an outcome names them, with the published model's number of experts and choices.

        Raises ValueError for anything else.
        """
        try:
            hidden_size, intermediate_size, experts = map(int, shape.split("x"))
        except ValueError:
            raise ValueError(
                f"{shape!r} names no sizes: give hidden, intermediate and experts, as 7168x256x384."
            ) from None
        text = TextConfig()
        return cls(
            shape,
            hidden_size,
            intermediate_size,
            experts,
            max(experts, text.n_routed_experts),
            text.num_experts_per_tok,
        )

    @property
    def shape(self) -> str:
        """The layer's sizes as an outcome names them. Raises ValueError for sizes that the kernels do not have."""
        from k26_kernels import Shape

        return Shape(self.hidden_size, self.intermediate_size, self.num_experts).key

    @property
    def expert_bytes(self) -> int:
        """Weights and scales of an expert here: 4.5 bits a weight."""
        return 3 * self.hidden_size * self.intermediate_size * 9 // 16

    def flops(self, pairs: int) -> int:
        return 6 * pairs * self.hidden_size * self.intermediate_size

    def expert_map(self, device: torch.device | None = None) -> torch.Tensor | None:
        """int32 `[global_experts]` where the rank holds a part of the experts: the first ones. On the CPU by default."""
        if self.num_experts == self.global_experts:
            return None
        local = torch.full((self.global_experts,), -1, dtype=torch.int32)
        local[: self.num_experts] = torch.arange(self.num_experts, dtype=torch.int32)
        return local.to(device)

    def pairs_here(self, ids: torch.Tensor) -> torch.Tensor:
        """The local experts of the token–expert pairs that have one, flat."""
        return ids[ids < self.num_experts].flatten()

    def choose(self, kind: str, num_tokens: int, seed: int = 0) -> torch.Tensor:
        """int32 `[num_tokens, top_k]`, different experts in a row.

        kind: `uniform`; `zipf`, an expert of rank r with a chance of 1 / r; `prefix`, the tokens of 300 requests of which
        each token of a shared prefix chose alike, so that few different rows occur.
        """
        generator = torch.Generator().manual_seed(seed)
        if kind == "prefix":
            rows = self.choose("uniform", max(1, num_tokens // 300), seed)
            return rows[torch.arange(num_tokens) % len(rows)]
        weights = torch.ones(self.global_experts)
        if kind == "zipf":
            weights = 1 / torch.arange(1, self.global_experts + 1)
            weights = weights[torch.randperm(self.global_experts, generator=generator)]
        chosen = torch.multinomial(weights.expand(num_tokens, -1), self.top_k, generator=generator)
        return chosen.to(torch.int32)

    def batches(self, kind: str, num_tokens: int, device: torch.device) -> list[Batch]:
        """Several that choose different experts, so that no weight is left in a cache; one where it touches enough."""
        generator = torch.Generator().manual_seed(1)
        made = []
        for seed in range(max(1, min(8, 64 // num_tokens))):
            ids = self.choose(kind, num_tokens, seed)
            x = torch.randn(num_tokens, self.hidden_size, generator=generator).to(torch.bfloat16)
            weights = torch.rand(ids.shape, generator=generator)
            made.append(Batch(x.to(device), weights.to(device), ids.to(device)))
        return made


@dataclass(frozen=True)
class Batch:
    """hidden_states `[num_tokens, hidden_size]`, topk_weights and topk_ids `[num_tokens, top_k]`."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
