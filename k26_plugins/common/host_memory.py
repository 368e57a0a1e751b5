"""How much of the host's memory is free, and a refusal before loading where it does not suffice."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class HostMemoryError(ValueError):
    """The host's memory does not suffice. The message has both numbers and the remedy."""


def available_bytes() -> int:
    """What this process may still take: the kernel's MemAvailable, or less where a control group (a container) says so."""
    available = next(
        int(line.split()[1]) * 1024 for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")
    )
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists():
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, int(text) - int(used.read_text()))
    return available


def require_host_memory(num_bytes: int, what: str, remedy: str) -> None:
    """Raise HostMemoryError where less than `num_bytes` are available."""
    available = available_bytes()
    if num_bytes > available:
        raise HostMemoryError(
            f"{what} need {num_bytes / 2**30:.1f} GiB of host memory, {available / 2**30:.1f} GiB are available: {remedy}."
        )
