"""Measure how much deferred experts change the answers of a small random model, as KL divergence from exact answers.

    python kernels/bench/deferred.py            under a minute on two cores; the table of docs/hybrid.md

The model has small layers of Kimi-K2.6's structure, with 8 experts a token as in the published model and half of the
experts on the CPU. It computes in float32. How much a trained model would be changed is another question, which this
does not answer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.experts.reference import reference_experts
from k26_plugins.common.reference.decoder import MoE
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny

SIZES = TinySizes(layers=16, experts=32, top_k=8)
PROMPTS, TOKENS = 2, 64


class DeferringMoE:
    """A MoE layer that defers some of its experts: the next layer adds them to its own output."""

    def __init__(self, moe: MoE, left: list[torch.Tensor], on_cpu: torch.Tensor, per_token: int) -> None:
        """Wrap a layer's MoE.

        left: deferred sums that the next layer takes; one list for all layers. on_cpu: ids of the experts that may be
        deferred; empty for the last layer. per_token: number of experts that may be deferred for a token.
        """
        self.moe, self.left, self.on_cpu, self.per_token = moe, left, on_cpu, per_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for `[tokens, hidden_size]`, with the experts that the layer before deferred."""
        topk_weights, topk_ids = self.moe.choose(x)
        rank = topk_weights.argsort(1, descending=True).argsort(1)
        is_deferred = (rank >= topk_ids.shape[1] - self.per_token) & torch.isin(topk_ids, self.on_cpu)

        def routed(ids: torch.Tensor) -> torch.Tensor:
            return reference_experts(x, ids, topk_weights, self.moe.expert, self.moe.config.n_routed_experts).to(
                x.dtype
            )

        out = routed(topk_ids.masked_fill(is_deferred, -1)) + self.moe.shared_experts.forward(x)
        out = out + (self.left.pop() if self.left else 0)
        if len(self.on_cpu):
            self.left.append(routed(topk_ids.masked_fill(~is_deferred, -1)))
        return out


def deferring_model(folder: Path, on_device: int, per_token: int, dtype: torch.dtype = torch.float32) -> KimiK26:
    """Return the reference model with deferred experts.

    Each layer but the last defers the `per_token` experts of a token that have the smallest weights, as far as they are
    not among the first `on_device` experts.
    """
    model = KimiK26(Checkpoint(folder), dtype)
    left: list[torch.Tensor] = []
    blocks = model.text.layers
    for block in blocks:
        if isinstance(block.mlp, MoE):
            first = block.mlp.config.n_routed_experts if block is blocks[-1] else on_device
            on_cpu = torch.arange(first, block.mlp.config.n_routed_experts)
            block.mlp = DeferringMoE(block.mlp, left, on_cpu, per_token)  # type: ignore[assignment]
    return model


def prompts() -> list[torch.Tensor]:
    """Return prompts of random tokens, each as long as a batch for which experts are deferred."""
    return [torch.randint(0, 256, (TOKENS,), generator=torch.Generator().manual_seed(seed)) for seed in range(PROMPTS)]


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean KL divergence in nats of next-token distributions. Takes log-probabilities `[T, vocab_size]`."""
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        make_tiny(tiny, SIZES)
        exact = KimiK26(Checkpoint(tiny), torch.float32)
        expected = torch.cat([exact.logprobs(prompt) for prompt in prompts()])
        print(f"{SIZES.layers} layers, {SIZES.experts // 2} of {SIZES.experts} experts on the CPU")
        print("| deferred of 8 | KL divergence, nats |\n|---|---|")
        for per_token in (1, 2, 4, 6, 8):
            model = deferring_model(tiny, SIZES.experts // 2, per_token)
            found = torch.cat([model.logprobs(prompt) for prompt in prompts()])
            print(f"| {per_token} | {divergence(expected, found):.1e} |", flush=True)


if __name__ == "__main__":
    main()
