"""Judges whether a server with speculative decoding gives the model's answers, by the same server without it.

Two runs of one server differ as well where their batches have different shapes, because a rounding near a tie of two
experts' scores routes a token to another expert. The difference of the server without speculation from itself, measured
in the same test, is therefore the yardstick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.agreement import BF16_NOISE, divergence

# The quantiles of the differences that are compared: the median, and the value that a twentieth of the judge's own
# differences exceeds.
MIDDLE, RARE = 0.5, 0.95


@dataclass
class Greedy:
    """Greedy answers to some prompts, with the positions of all answers in a row."""

    token_ids: torch.Tensor
    """The answers' tokens, `[positions]`; in a right answer each is the likeliest token that was allowed."""
    logprobs: torch.Tensor
    """The log-probabilities by which each token was chosen, `[positions, vocab]`."""
    expected: torch.Tensor
    """The log-probabilities, `[positions, vocab]`, of a server without speculation, with the whole answer as its
    prompt."""

    def behind(self, allowed: list[int]) -> torch.Tensor:
        """Return how far, in log-probability, each token is behind the token that the judge would have chosen."""
        chosen = self.expected.gather(1, self.token_ids[:, None])[:, 0]
        return self.expected[:, allowed].max(1).values - chosen

    def divergence(self) -> torch.Tensor:
        """Return the KL divergence at each position, in nats."""
        return divergence(self.logprobs, self.expected)


def assert_no_farther(found: Greedy, own: Greedy, allowed: list[int]) -> None:
    """Assert that answers with speculation are no farther from the judge than the judge is from itself.

    found: answers with speculation. own: answers of the server without speculation, which computed them token by token
    and then again as a whole prompt. allowed: the token ids that the answers could be chosen from.
    """
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
    """A greedy answer: its text, and for each position the token and the log-probabilities by which it was chosen."""

    text: str
    tokens: list[str]
    logprobs: list[dict[str, float]]


def parts(one: Steps, other: Steps) -> bool:
    """Return whether the first token that differs between two answers is behind `one`'s own token by more than noise.

    Later tokens say nothing, because the answers then continue different texts. Answers without such a token differ if
    their lengths do.
    """
    for token, own, logprobs in zip(other.tokens, one.tokens, one.logprobs, strict=False):
        if token != own:
            return logprobs[own] - logprobs.get(token, -math.inf) > 2 * BF16_NOISE
    return len(one.tokens) != len(other.tokens)


def assert_parts_no_more(
    guessed: dict[str, Steps], alone: dict[str, Steps], together: dict[str, Steps], mangled: Callable[[Steps], Steps]
) -> None:
    """Assert that speculation changes no more answers than another batch's shape does.

    guessed: answers with speculation. alone: answers to the same questions without speculation, asked one by one.
    together: the same, asked all at once. mangled: returns an answer as it would be if a guess had been taken without a
    check; the comparison must find most of those.
    """
    found, own, bad = (
        [name for name in alone if parts(alone[name], one[name])]
        for one in (guessed, together, {name: mangled(steps) for name, steps in alone.items()})
    )
    print(f"{len(alone)} answers part from the server's without speculation: {found}; its own at once: {own}")
    assert len(found) <= len(own) + 2 * math.sqrt(len(own) + 1)
    assert len(bad) > len(alone) // 2
