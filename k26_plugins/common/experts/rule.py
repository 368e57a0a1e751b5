"""Choose which of the measured kernels serves, as a pure function of an outcome."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from k26_plugins.common.experts.outcome import OURS, Timing
from k26_plugins.common.purpose import Purpose

# A difference below this share of the time does not count, because two measurements of one kernel differ by about as
# much.
MARGIN = 0.03
# Errors count as equal up to this factor, because correct kernels differ in the order of their sums.
EQUAL_ERRORS = 1.1
# A relative error above this is more than rounding. The self-test at a server's start has the same limit.
WRONG = 1e-2
# Tokens of the longest batch that counts as decode; longer batches are prefill.
DECODE_TOKENS = 256

Cells = Mapping[tuple[str, int], Timing]
"""One kernel's timings by (routing, number of tokens)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that serves, or None if no measured kernel may serve; `why` is the reason, for a log line."""

    kernel: str | None
    why: str


def choose(timings: Iterable[Timing], purpose: Purpose) -> Choice:
    """Choose one kernel for all batches of a server, since the weights can have one layout only.

    The core's kernel is chosen if it is faster than the fastest kernel of the engine by 3 % or more, in the geometric
    mean over the batches of the purpose. In this mean each size counts alike and, for `both`, decode counts as much as
    prefill. A batch on which the two differ by less than 3 % counts as a tie, and so does one on which the
    core's kernel is faster with a larger error; a batch on which it is slower counts whatever the errors are. A kernel
    that did not run, or gave a wrong result, on one of these batches is not chosen.
    """
    by_kernel: dict[str, dict[tuple[str, int], Timing]] = defaultdict(dict)
    for timing in timings:
        by_kernel[timing.kernel][timing.routing, timing.tokens] = timing
    counted = _weights({cell for cells in by_kernel.values() for cell in cells}, purpose)
    if not counted:
        return Choice(None, f"no batch of {purpose} was measured")
    right = {kernel: cells for kernel, cells in by_kernel.items() if _is_right(cells, counted)}
    rivals = {kernel: cells for kernel, cells in right.items() if kernel != OURS}
    if not rivals:
        if OURS in right:
            return Choice(OURS, "no kernel of the engine ran rightly on every batch")
        return Choice(None, "no kernel ran rightly on every batch")
    rival = min(rivals, key=lambda kernel: _mean({cell: _time(rivals[kernel][cell]) for cell in counted}, counted))
    if OURS not in right:
        return Choice(rival, f"{OURS} did not run rightly on every batch")
    gain = _mean({cell: _gain(right[OURS][cell], rivals[rival][cell]) for cell in counted}, counted)
    said = f"for {purpose} {OURS} takes {1 / gain:.2f} of the time of {rival}, gains with a larger error left out"
    return Choice(OURS if gain * (1 - MARGIN) >= 1 else rival, said)


def _weights(cells: Iterable[tuple[str, int]], purpose: Purpose) -> dict[tuple[str, int], float]:
    """Return the weight of each batch that counts.

    The sizes of decode share the weight 1 evenly, and so do the sizes of prefill. The routings of a size share the
    size's weight.
    """
    routings: dict[int, list[str]] = defaultdict(list)
    for routing, tokens in cells:
        routings[tokens].append(routing)
    kinds = {
        Purpose.DECODE: [tokens for tokens in routings if tokens <= DECODE_TOKENS],
        Purpose.PREFILL: [tokens for tokens in routings if tokens > DECODE_TOKENS],
    }
    wanted = [sizes for kind, sizes in kinds.items() if purpose in (kind, Purpose.BOTH)]
    return {
        (routing, tokens): 1 / len(sizes) / len(routings[tokens])
        for sizes in wanted
        for tokens in sizes
        for routing in routings[tokens]
    }


def _is_right(cells: Cells, counted: Iterable[tuple[str, int]]) -> bool:
    found = [cells.get(cell) for cell in counted]
    return all(one is not None and one.milliseconds is not None and _error(one) <= WRONG for one in found)


def _time(timing: Timing) -> float:
    assert timing.milliseconds is not None, "a kernel that ran has a time"
    return timing.milliseconds


def _error(timing: Timing) -> float:
    return math.inf if timing.error is None else timing.error


def _gain(ours: Timing, theirs: Timing) -> float:
    """Return how many times as fast the core's kernel is, or 1 if the difference does not count."""
    gain = _time(theirs) / _time(ours)
    if 1 - MARGIN < gain < 1 / (1 - MARGIN):
        return 1.0
    return 1.0 if gain > 1 and _error(ours) > EQUAL_ERRORS * _error(theirs) else gain


def _mean(values: Mapping[tuple[str, int], float], weights: Mapping[tuple[str, int], float]) -> float:
    """Return the weighted geometric mean."""
    return math.exp(sum(weights[cell] * math.log(value) for cell, value in values.items()) / sum(weights.values()))
