"""Decide when a step may be sent.

In a closed loop a number of steps is in flight at once; in an open loop steps are sent at arrival times of their own.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Pace:
    """The pace of a run: a closed loop of `concurrency` requests or, if there is a `rate`, an open loop."""

    def __init__(self, concurrency: int, rate: float | None, seed: int) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        self._rate = rate
        self._random = random.Random(f"arrivals {seed}")
        self._next: float | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait until a step may be sent; the context is the time in which the request is in flight.

        The context's value is the number of seconds by which the step is later than its arrival time, because its agent
        was not ready earlier; 0 in a closed loop.
        """
        if self._rate is None:
            async with self._slots:
                yield 0.0
            return
        now = time.perf_counter()
        arrival = now if self._next is None else self._next
        self._next = arrival + self._random.expovariate(self._rate)
        if arrival > now:
            await asyncio.sleep(arrival - now)
        yield max(now - arrival, 0.0)
