"""How much of the host's memory is free, and a refusal before loading where it does not suffice."""

from __future__ import annotations

from pathlib import Path

from k26_plugins.common.host.control_groups import memory_left, memory_limit

_MEMINFO = Path("/proc/meminfo")


class HostMemoryError(ValueError):
    """The host's memory does not suffice. The message has both numbers and the remedy."""


def total_bytes() -> int:
    """The machine's memory, or less where a control group (a container) says so."""
    total, limit = _meminfo("MemTotal"), memory_limit()
    return total if limit is None else min(total, limit)


def available_bytes() -> int:
    """What this process may still take: the kernel's MemAvailable, or less where a control group says so."""
    available, left = _meminfo("MemAvailable"), memory_left()
    return available if left is None else max(min(available, left), 0)


def _meminfo(name: str) -> int:
    return next(
        int(line.split()[1]) * 1024 for line in _MEMINFO.read_text().splitlines() if line.startswith(f"{name}:")
    )


def require_host_memory(num_bytes: int, what: str, remedy: str) -> None:
    """Raise HostMemoryError where less than `num_bytes` are available."""
    available = available_bytes()
    if num_bytes > available:
        raise HostMemoryError(
            f"{what} need {num_bytes / 2**30:.1f} GiB of host memory, {available / 2**30:.1f} GiB are available: {remedy}."
        )
