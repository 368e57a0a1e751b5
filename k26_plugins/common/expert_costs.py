"""What an expert's computation costs, by its number of tokens, where it lies and where it is copied to.

Without torch: the planner computes with it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEASURED_TOKENS = (1, 256)
"""Tokens of each expert in the two measurements that a line goes through."""
# A prediction must save this share of the time to be followed: the measured figures are not exact.
MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds that an expert takes: to read or copy its weights, and for each of its tokens."""

    expert: float
    token: float

    def seconds(self, tokens: int) -> float:
        """Seconds for one expert that `tokens` tokens chose."""
        return self.expert + self.token * tokens

    @classmethod
    def through(cls, few: float, many: float) -> Line:
        """The line through the seconds that the two MEASURED_TOKENS took, without a slope below 0."""
        low, high = MEASURED_TOKENS
        token = max(0.0, many - few) / (high - low)
        return cls(max(0.0, few - token * low), token)


@dataclass(frozen=True, slots=True)
class StreamCosts:
    """What an expert costs on the host, and streamed to the device. The two work at the same time."""

    host: Line
    streamed: Line

    def choose(self, counts: Sequence[int]) -> list[int]:
        """The experts to stream, those with the most tokens, so that both sides end together; none if little is gained.

        counts: tokens of each of the host's experts.
        """
        used = [(count, expert) for expert, count in enumerate(counts) if count]
        host = sum(self.host.seconds(count) for count, _ in used)
        limit = host * (1 - MARGIN)
        if limit <= self.streamed.expert:
            return []
        used.sort(key=lambda item: -item[0])
        shortest, best = limit, 0
        streamed = 0.0
        for number, (count, _) in enumerate(used, 1):
            host -= self.host.seconds(count)
            streamed += self.streamed.seconds(count)
            if max(host, streamed) < shortest:
                shortest, best = max(host, streamed), number
        return [expert for _, expert in used[:best]]

    def predict(self, counts: Sequence[int]) -> float:
        """Seconds of a batch with these experts, streamed as `choose` says."""
        chosen = set(self.choose(counts))
        streamed = sum(self.streamed.seconds(counts[expert]) for expert in chosen)
        host = sum(self.host.seconds(c) for expert, c in enumerate(counts) if c and expert not in chosen)
        return max(host, streamed)
