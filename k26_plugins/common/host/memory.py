"""Read how much host memory is available, and refuse to load what does not fit."""

from __future__ import annotations

from pathlib import Path

from k26_plugins.common.host.control_groups import memory_left, memory_limit

_MEMINFO = Path("/proc/meminfo")


class HostMemoryError(ValueError):
    """The host's memory does not suffice. The message names the bytes needed, the bytes available and the remedy."""


def total_bytes() -> int:
    """Return the bytes of the machine's memory, or the limit of a control group (a container) if that is less."""
    total, limit = _meminfo("MemTotal"), memory_limit()
    return total if limit is None else min(total, limit)


def available_bytes() -> int:
    """Return the bytes that this process may still allocate: the kernel's MemAvailable, or less if a control group
    allows less.
    """
    available, left = _meminfo("MemAvailable"), memory_left()
    return available if left is None else max(min(available, left), 0)


def _meminfo(name: str) -> int:
    return next(
        int(line.split()[1]) * 1024 for line in _MEMINFO.read_text().splitlines() if line.startswith(f"{name}:")
    )


def require_host_memory(num_bytes: int, what: str, remedy: str) -> None:
    """Raise HostMemoryError if fewer than `num_bytes` bytes are available.

    what: the subject of the message, such as "12 experts of 60 layers on the CPU". remedy: what the user can do, for
    the message.
    """
    available = available_bytes()
    if num_bytes > available:
        raise HostMemoryError(
            f"{what} need {num_bytes / 2**30:.1f} GiB of host memory, {available / 2**30:.1f} GiB are available: {remedy}."
        )
