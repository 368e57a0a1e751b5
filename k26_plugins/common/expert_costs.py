"""Model the seconds that an expert takes, by its number of tokens, on the host or on the device.

The module does without torch, because the planner (`k26 plan`) computes with it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEASURED_TOKENS = (1, 256)
"""The two numbers of tokens per expert at which times are measured; `Line.through` goes through both points."""
# Experts are streamed only if that is predicted to save more than this share of the time: measured times are not exact.
MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Line:
    """The time of one expert as a linear function of its tokens."""

    expert: float
    """Seconds to read or copy the expert's weights, whatever the number of tokens."""
    token: float
    """Seconds for each token that chose the expert."""

    def seconds(self, tokens: int) -> float:
        """Return the seconds that one expert takes for `tokens` tokens."""
        return self.expert + self.token * tokens

    @classmethod
    def through(cls, few: float, many: float) -> Line:
        """Return the line through the seconds `few` and `many` measured at MEASURED_TOKENS; slope and offset are at
        least 0.
        """
        low, high = MEASURED_TOKENS
        token = max(0.0, many - few) / (high - low)
        return cls(max(0.0, few - token * low), token)


@dataclass(frozen=True, slots=True)
class StreamCosts:
    """The costs of an expert that the host computes, and of one that is streamed.

    Streaming copies the expert's weights to the device for one batch. Host and device work at the same time.
    """

    host: Line
    streamed: Line

    def choose(self, counts: Sequence[int]) -> list[int]:
        """Return the indices of the experts to stream, so that host and device end at about the same time.

        The experts with the most tokens are chosen first. The list is empty if streaming saves no more than MARGIN of
        the time. counts: tokens of each expert that is kept on the host.
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
        """Return the seconds of a batch with `counts` tokens per expert, if the experts that `choose` returns are
        streamed.
        """
        chosen = set(self.choose(counts))
        streamed = sum(self.streamed.seconds(counts[expert]) for expert in chosen)
        host = sum(self.host.seconds(c) for expert, c in enumerate(counts) if c and expert not in chosen)
        return max(host, streamed)
