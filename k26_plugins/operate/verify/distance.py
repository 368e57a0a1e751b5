"""How far two answers are apart where each shows only its likeliest tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

Token = TypeVar("Token", int, bytes)


def allowed_share(expected: float, count: int) -> float:
    """The largest share of `count` positions that a rate of `expected` gives by chance: two standard deviations above."""
    return expected + 2 * math.sqrt(expected * max(1 - expected, 0.0) / count)


def share_above(values: Sequence[float], limit: float) -> float:
    return sum(value > limit for value in values) / len(values)


def kl_of_reported(first: Mapping[Token, float], other: Mapping[Token, float]) -> float:
    """KL of two distributions, Σ p · (log p − log q), over the tokens that both report and one cell for all the rest.

    Joining tokens into cells never makes it larger than over the whole vocabulary. NaN where no token is shared.
    """
    shared = first.keys() & other.keys()
    if not shared:
        return math.nan
    total = sum(math.exp(first[token]) * (first[token] - other[token]) for token in shared)
    rest = max(1.0 - sum(math.exp(first[token]) for token in shared), 0.0)
    other_rest = max(1.0 - sum(math.exp(other[token]) for token in shared), 0.0)
    # Rests this small are the rounding of reported log-probabilities.
    if rest > 1e-6 and other_rest > 1e-6:
        total += rest * math.log(rest / other_rest)
    return max(total, 0.0)
