"""Measure how far apart two distributions are if each reports only its likeliest tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

Token = TypeVar("Token", int, bytes)


def allowed_share(expected: float, count: int) -> float:
    """Return the largest share of `count` positions that chance allows at a rate of `expected`.

    That is two standard deviations above the rate.
    """
    return expected + 2 * math.sqrt(expected * max(1 - expected, 0.0) / count)


def share_above(values: Sequence[float], limit: float) -> float:
    """Return the share of the values that are above the limit."""
    return sum(value > limit for value in values) / len(values)


def kl_of_reported(first: Mapping[Token, float], other: Mapping[Token, float]) -> float:
    """Return the KL divergence in nats over the tokens that both report and one cell for all others.

    That is Σ p · (log p − log q). Takes log-probabilities by token. Merging tokens into one cell never makes the
    divergence larger than it is over the whole vocabulary. Returns NaN if no token is in both.
    """
    shared = first.keys() & other.keys()
    if not shared:
        return math.nan
    total = sum(math.exp(first[token]) * (first[token] - other[token]) for token in shared)
    rest = max(1.0 - sum(math.exp(first[token]) for token in shared), 0.0)
    other_rest = max(1.0 - sum(math.exp(other[token]) for token in shared), 0.0)
    # A smaller rest is nothing but the rounding of the reported log-probabilities.
    if rest > 1e-6 and other_rest > 1e-6:
        total += rest * math.log(rest / other_rest)
    return max(total, 0.0)
