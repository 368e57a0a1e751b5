"""Whether answers with speculative decoding are the model's, judged by the same server without it.

Two runs of one server differ too where the batch has another shape: a rounding near a tie of two experts' scores sends a
token elsewhere. So what one server without speculation differs from itself by is the measure, taken in the same test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.agreement import BF16_NOISE, divergence

# Quantiles of the two servers' differences: half of the positions are below, and a twentieth of the server's own is beyond.
MIDDLE, RARE = 0.5, 0.95


@dataclass
class Greedy:
    """Greedy answers to some prompts, position after position."""

    token_ids: torch.Tensor
    """`[positions]`, each the likeliest of `allowed`, if it is an answer of the model's."""
    logprobs: torch.Tensor
    """`[positions, vocab]`, as computed when the token was chosen."""
    expected: torch.Tensor
    """The log-probabilities of a server without speculation that was given the whole answer as a prompt."""

    def behind(self, allowed: list[int]) -> torch.Tensor:
        """How far, in log-probability, each token is behind the one that the judge would have chosen."""
        chosen = self.expected.gather(1, self.token_ids[:, None])[:, 0]
        return self.expected[:, allowed].max(1).values - chosen

    def divergence(self) -> torch.Tensor:
        """The KL divergence of each position."""
        return divergence(self.logprobs, self.expected)


def assert_no_farther(found: Greedy, own: Greedy, allowed: list[int]) -> None:
    """found: answers with speculation. own: those of the judge itself, answered token by token and read as a whole."""
    positions = len(found.token_ids)
    assert positions == len(own.token_ids) > 200
    far, own_far = ((one.behind(allowed) > 2 * BF16_NOISE).sum().item() for one in (found, own))
    kl, own_kl = found.divergence(), own.divergence()
    rare = own_kl.quantile(RARE)
    beyond = (kl > rare).float().mean().item()
    middles = [one.quantile(MIDDLE).item() for one in (kl, own_kl)]
    print(
        f"{positions} positions: another token than the judge's by more than noise {far} (the judge itself {own_far}), "
        f"median KL {middles[0]:.1e} ({middles[1]:.1e}), beyond {rare:.1e} {beyond:.3f} ({1 - RARE:.3f})"
    )
    assert far <= own_far + 3 * math.sqrt(own_far + 1)
    assert middles[0] <= 2 * middles[1]
    assert beyond <= 1 - RARE + 3 * math.sqrt(2 * RARE * (1 - RARE) / positions)


@dataclass
class Steps:
    """A greedy answer as text and, position by position, the token and the log-probabilities that it was chosen by."""

    text: str
    tokens: list[str]
    logprobs: list[dict[str, float]]


def parts(one: Steps, other: Steps) -> bool:
    """Whether the first token that differs does so by more than noise. Up to there both had the same to go by."""
    for token, own, logprobs in zip(other.tokens, one.tokens, one.logprobs, strict=False):
        if token != own:
            return logprobs[own] - logprobs.get(token, -math.inf) > 2 * BF16_NOISE
    return len(one.tokens) != len(other.tokens)


def assert_parts_no_more(
    guessed: dict[str, Steps], alone: dict[str, Steps], together: dict[str, Steps], mangled: Callable[[Steps], Steps]
) -> None:
    """Assert that speculation changes no more answers than another batch's shape does.

    guessed: answers with speculation. alone: the same questions without it, asked one by one; together: all at once.
    mangled: an answer as it would be if a guess had been taken unseen. The judge must find most of those.
    """
    found, own, bad = (
        [name for name in alone if parts(alone[name], one[name])]
        for one in (guessed, together, {name: mangled(steps) for name, steps in alone.items()})
    )
    print(f"{len(alone)} answers part from the server's without speculation: {found}; its own at once: {own}")
    assert len(found) <= len(own) + 2 * math.sqrt(len(own) + 1)
    assert len(bad) > len(alone) // 2
