"""When a step may be sent: so many at once (closed loop), or at arrival times of their own (open loop)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Pace:
    """Closed loop with `concurrency`; with `rate` a seeded Poisson process of arrivals, whatever the server does."""

    def __init__(self, concurrency: int, rate: float | None, seed: int) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        self._rate = rate
        self._random = random.Random(f"arrivals {seed}")
        self._next: float | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait for the right to send; gives the seconds by which an arrival had to wait for an agent to be ready."""
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
