"""Which of the measured kernels serves: a pure function of an outcome."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from k26_plugins.common.experts.outcome import OURS, Timing
from k26_plugins.common.purpose import Purpose

# A win of less than this share of the time is none: two measurements of one kernel differ by about as much.
MARGIN = 0.03
# Errors are equal up to this factor: right kernels differ in the order of their sums.
EQUAL_ERRORS = 1.1
# A relative error above it is no rounding: the self-test's limit at a server's start.
WRONG = 1e-2
# The longest batch of decoding; longer ones are prefill.
DECODE_TOKENS = 256

Cells = Mapping[tuple[str, int], Timing]
"""One kernel's timings by routing and tokens."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`kernel` is None where nothing that was measured may serve; `why` is for a log line."""

    kernel: str | None
    why: str


def choose(timings: Iterable[Timing], purpose: Purpose) -> Choice:
    """One kernel for a server, since the weights have one layout.

    The core's is taken where it is faster than the fastest kernel of the engine by 3 % or more: the geometric mean over
    the batches of the purpose, each size counted alike and decode as much as prefill for `both`. A batch on which it is
    faster counts only by 3 % and with an error that is no larger; one on which it is slower always counts. A kernel that
    did not run, or was wrong, on one of these batches is not taken.
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
    """The weight of each batch that counts: sizes of decode share one weight, and those of prefill together have as much."""
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
    """How many times faster ours is, as far as it counts."""
    gain = _time(theirs) / _time(ours)
    if 1 - MARGIN < gain < 1 / (1 - MARGIN):
        return 1.0
    return 1.0 if gain > 1 and _error(ours) > EQUAL_ERRORS * _error(theirs) else gain


def _mean(values: Mapping[tuple[str, int], float], weights: Mapping[tuple[str, int], float]) -> float:
    """The geometric one."""
    return math.exp(sum(weights[cell] * math.log(value) for cell, value in values.items()) / sum(weights.values()))
