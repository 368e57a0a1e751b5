"""Resident memory of a server on this machine: of its process and all that it started."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from urllib.parse import urlsplit

import psutil

FLAT = 0.05
"""How much more the last quarter of a run may hold than its second quarter."""
MIN_SECONDS = 240.0
"""The shortest run whose memory is judged: in a shorter one the server still fills its caches."""

Sample = tuple[float, int]
"""Seconds since the run began, bytes."""


def server_pid(url: str) -> int | None:
    """The process on this machine that listens where `url` leads, None where there is none or it is another user's."""
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
    """The process and all that it started; none where it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident_bytes(pid: int) -> int:
    """0 where the process is gone. Pages that its processes share count once for each."""
    total = 0
    for process in processes(pid):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def growth(samples: Sequence[Sample]) -> float | None:
    """The last quarter's mean over the second quarter's, less 1; None for a run that is too short to tell."""
    end = samples[-1][0] if samples else 0.0
    if end < MIN_SECONDS:
        return None
    second = [size for at, size in samples if end / 4 <= at < end / 2]
    last = [size for at, size in samples if at >= 3 * end / 4]
    return mean(last) / mean(second) - 1 if second and last and mean(second) else None
