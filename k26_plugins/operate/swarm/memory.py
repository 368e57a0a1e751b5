"""Measure the resident memory of a server on this machine, of its process and of all processes that it started."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from urllib.parse import urlsplit

import psutil

FLAT = 0.05
"""The share by which the mean memory of the last quarter of a run may exceed that of the second quarter."""
MIN_SECONDS = 240.0
"""The shortest run, in seconds, whose memory is judged; in a shorter one the server is still filling its caches."""

Sample = tuple[float, int]
"""Seconds since the run began, and bytes."""


def server_pid(url: str) -> int | None:
    """Return the id of the process that listens at `url`.

    Returns None if `url` is not on this machine, if no process listens there, or if the process is another user's.
    """
    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return None
    port = parts.port or 80
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return connection.pid
    except psutil.AccessDenied:
        pass
    return None


def processes(pid: int) -> list[psutil.Process]:
    """Return the process and all processes that it started, directly or not; empty if the process has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident_bytes(pid: int) -> int:
    """Return the resident bytes of the process and of all processes that it started; 0 if the process has ended.

    Pages that several of these processes share are counted once for each of them.
    """
    total = 0
    for process in processes(pid):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def growth(samples: Sequence[Sample]) -> float | None:
    """Return by which share the mean memory of a run's last quarter exceeds that of the second quarter.

    Returns None for a run that is shorter than MIN_SECONDS.
    """
    end = samples[-1][0] if samples else 0.0
    if end < MIN_SECONDS:
        return None
    second = [size for at, size in samples if end / 4 <= at < end / 2]
    last = [size for at, size in samples if at >= 3 * end / 4]
    return mean(last) / mean(second) - 1 if second and last and mean(second) else None
