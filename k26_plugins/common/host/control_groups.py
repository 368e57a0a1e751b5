"""What control groups allow this process: memory and CPU time of its own group and of all above it, versions 1 and 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc/self")
ROOT = Path("/sys/fs/cgroup")
# A group of version 1 without a limit has the largest multiple of a page that fits into 63 bits.
NO_LIMIT = 2**60


def memory_limit() -> int | None:
    """Bytes that the tightest group allows, None without one."""
    return min((limit for limit, _ in _memory()), default=None)


def memory_left() -> int | None:
    """Bytes that the tightest group has left, None without a limit.

    Pages of files count as left: the kernel takes them back when a process wants memory.
    """
    return min((limit - used for limit, used in _memory()), default=None)


def cpu_quota() -> float | None:
    """CPUs' worth of time that the tightest group allows, None without a limit."""
    quotas = []
    for folder in _groups("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        with suppress(ValueError, ZeroDivisionError):  # "max", "-1", or no such file
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def usable_cpus() -> int:
    """CPUs that this process can keep busy: those that it may run on, fewer where its time is limited, at least one."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def _memory() -> Iterator[tuple[int, int]]:
    """Limit and use without file cache of every group that has a limit."""
    for folder in _groups("memory"):
        for limit, usage, inactive in (
            ("memory.max", "memory.current", ("inactive_file", "active_file")),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        ):
            text = _read(folder / limit)
            if not text.isdigit() or int(text) >= NO_LIMIT:
                continue
            used = _read(folder / usage)
            counted = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
            cache = sum(int(counted.get(name, 0)) for name in inactive)
            # The root of a container's own view may lack the use: what is known is the limit.
            yield int(text), max(int(used) - cache, 0) if used.isdigit() else 0


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of all above it, for version 2 and for a controller of version 1."""
    for line in _read(PROC / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            # Beside controllers of version 1 the unified tree is mounted in a folder of its own.
            roots = [ROOT, ROOT / "unified"]
        elif controller in controllers.split(","):
            roots = [ROOT / controller, ROOT / controllers]
        else:
            continue
        for root in roots:
            # In a container the tree's root is the container's group, whatever the path says of the host.
            inside = Path(path.lstrip("/"))
            for folder in (inside, *inside.parents):
                if (root / folder).is_dir():
                    yield root / folder


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
