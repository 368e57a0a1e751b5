"""Tells whether a server that is not ready yet is still at work.

On a loaded machine a start takes many times as long, so CPU time and standing still are limited, not the time of the
clock.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

STILL_SECONDS = 180
"""After this many seconds without a line in the log and without CPU time, the server will not become ready."""
CPU_SECONDS = 900
"""A start whose processes together took more CPU time than this will never end. The longest start takes 200."""
# An idle process wakes now and then, so a process that uses less than this share of a core counts as standing still.
STILL_SHARE = 0.01


class StandsStillError(RuntimeError):
    """The server does nothing, or runs without end; the message says which."""


class Progress:
    """The progress of a process and its descendants, by their CPU time and by the process's log."""

    def __init__(self, pid: int, log: Path) -> None:
        self._process, self._log = psutil.Process(pid), log
        self._cpu: dict[int, float] = {}
        self._written, self._used, self._moved = 0, 0.0, time.monotonic()

    def check(self) -> None:
        """Look at the processes and the log. Raises StandsStillError if the server will not become ready."""
        used, written, now = self._cpu_seconds(), self._log.stat().st_size, time.monotonic()
        if used > CPU_SECONDS:
            raise StandsStillError(f"not ready after {used:.0f} s of CPU time")
        still = now - self._moved
        if written != self._written or used - self._used > STILL_SHARE * max(still, 1.0):
            self._written, self._used, self._moved = written, used, now
        elif still > STILL_SECONDS:
            raise StandsStillError(f"no line in the log and no CPU time for {still:.0f} s")

    def _cpu_seconds(self) -> float:
        """Return the CPU time of all processes seen so far; a process that ended counts as when it was last seen."""
        with suppress(psutil.NoSuchProcess):
            for process in (self._process, *self._process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
        return sum(self._cpu.values())
