"""A rank's part of a layer, and batches to measure it with: even routing, skewed routing, requests with one prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k26_plugins.common.model.config import TextConfig


@dataclass(frozen=True)
class Layer:
    """The routed experts of one layer on one rank: their sizes on that rank, and how many experts a token chooses."""

    name: str
    hidden_size: int
    intermediate_size: int
    """The rank's part of an expert's intermediate size."""
    num_experts: int
    """Number of experts that the rank holds."""
    global_experts: int = 384
    """Number of experts in the whole layer."""
    top_k: int = 8
    """Number of experts that a token chooses."""

    @classmethod
    def of_rank(cls, text: TextConfig, tp: int, ep: int) -> Layer:
        """Return one rank's part of a layer whose experts are each cut into `tp` parts and distributed over `ep` ranks.

        Raises ValueError if the experts' rows or the experts themselves cannot be divided evenly.
        """
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
        """Return a layer of a rank's sizes as an outcome names them: `7168x256x384`.

        The number of experts in the whole layer and of those that a token chooses are the published model's. Raises
        ValueError if `shape` does not have this form.
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
        """The rank's sizes as an outcome names them. Raises ValueError for sizes that the kernels do not support."""
        from k26_kernels import Shape

        return Shape(self.hidden_size, self.intermediate_size, self.num_experts).key

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights and scales on this rank: 4.5 bits a weight."""
        return 3 * self.hidden_size * self.intermediate_size * 9 // 16

    def flops(self, pairs: int) -> int:
        """Return the floating-point operations of so many token–expert pairs on this rank."""
        return 6 * pairs * self.hidden_size * self.intermediate_size

    def expert_map(self, device: torch.device | None = None) -> torch.Tensor | None:
        """Return each expert's index on this rank, −1 for other ranks' experts; None if the rank holds all experts.

        The result is int32 `[global_experts]`, on the CPU by default. A rank with a part of the experts holds the first
        ones.
        """
        if self.num_experts == self.global_experts:
            return None
        local = torch.full((self.global_experts,), -1, dtype=torch.int32)
        local[: self.num_experts] = torch.arange(self.num_experts, dtype=torch.int32)
        return local.to(device)

    def pairs_here(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the experts of those token–expert pairs whose expert is on this rank, as a flat tensor.

        ids: experts chosen by tokens, `[num_tokens, top_k]`.
        """
        return ids[ids < self.num_experts].flatten()

    def choose(self, kind: str, num_tokens: int, seed: int = 0) -> torch.Tensor:
        """Draw the experts that each token chooses: int32 `[num_tokens, top_k]`, on the CPU, all different in a row.

        kind: `uniform` draws all experts alike. `zipf` draws the r-th most popular expert with a weight of 1 / r.
        `prefix` stands for the tokens of 300 requests that share a prefix: a token of the prefix makes the same choice
        in every request, so that few different rows occur.
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
        """Return batches that together touch so many experts that no weight is left in a cache.

        Batches of few tokens are several, which choose different experts; a larger batch touches enough experts by
        itself.
        """
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
    """One batch of tokens with their routing.

    hidden_states: bfloat16 `[num_tokens, hidden_size]`. topk_weights: float32 `[num_tokens, top_k]`. topk_ids: int32
    `[num_tokens, top_k]`.
    """

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
