"""Whether a server that is not ready yet is still at work: on a loaded machine a start takes many times as long."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

STILL_SECONDS = 180
"""After so long without a line in the log and without CPU time nothing more is to be expected."""
CPU_SECONDS = 900
"""A start whose processes took more CPU time than this together never ends. The longest takes 200."""
# An idle process wakes now and then: less than this share of a core is standing still.
STILL_SHARE = 0.01


class StandsStillError(RuntimeError):
    """It does nothing, or the same for ever; the message says which."""


class Progress:
    """Follows a process, its descendants and its log."""

    def __init__(self, pid: int, log: Path) -> None:
        self._process, self._log = psutil.Process(pid), log
        self._cpu: dict[int, float] = {}
        self._written, self._used, self._moved = 0, 0.0, time.monotonic()

    def check(self) -> None:
        """Raises StandsStillError."""
        used, written, now = self._cpu_seconds(), self._log.stat().st_size, time.monotonic()
        if used > CPU_SECONDS:
            raise StandsStillError(f"not ready after {used:.0f} s of CPU time")
        still = now - self._moved
        if written != self._written or used - self._used > STILL_SHARE * max(still, 1.0):
            self._written, self._used, self._moved = written, used, now
        elif still > STILL_SECONDS:
            raise StandsStillError(f"no line in the log and no CPU time for {still:.0f} s")

    def _cpu_seconds(self) -> float:
        """CPU time of every process seen so far: those that have ended count with what they had used when last seen."""
        with suppress(psutil.NoSuchProcess):
            for process in (self._process, *self._process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
        return sum(self._cpu.values())
