"""Read what the control groups (versions 1 and 2) allow this process: memory and CPU time.

Limits of the process's own group and of all groups above it apply.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc/self")
ROOT = Path("/sys/fs/cgroup")
# In version 1, a group without a limit shows the largest multiple of the page size that fits into 63 bits.
NO_LIMIT = 2**60


def memory_limit() -> int | None:
    """Return the lowest memory limit of all groups in bytes, or None if no group has a limit."""
    return min((limit for limit, _ in _memory()), default=None)


def memory_left() -> int | None:
    """Return the bytes that this process may still use under the limits of all groups, or None if no group has a limit.

    The page cache (pages of files) counts as free, because the kernel reclaims it when a process needs memory.
    """
    return min((limit - used for limit, used in _memory()), default=None)


def cpu_quota() -> float | None:
    """Return the lowest CPU quota of all groups as a number of CPUs, or None if no group has a quota."""
    quotas = []
    for folder in _groups("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        with suppress(ValueError, ZeroDivisionError):  # the text is "max" or "-1", or the file does not exist
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def usable_cpus() -> int:
    """Return how many CPUs this process can keep busy: the CPUs it may run on, fewer if a quota allows fewer, at least
    1.
    """
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def _memory() -> Iterator[tuple[int, int]]:
    """Yield the limit in bytes, and the use without page cache in bytes, of every group that has a limit."""
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
            # The root group as a container sees it may lack the file with the use; then only the limit is known.
            yield int(text), max(int(used) - cache, 0) if used.isdigit() else 0


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of all groups above it, for version 2 and for `controller` of
    version 1.
    """
    for line in _read(PROC / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            # Where controllers of version 1 are mounted too, version 2's unified tree has a folder of its own.
            roots = [ROOT, ROOT / "unified"]
        elif controller in controllers.split(","):
            roots = [ROOT / controller, ROOT / controllers]
        else:
            continue
        for root in roots:
            # In a container the mounted root is the container's own group, while the path may be the one on the host.
            inside = Path(path.lstrip("/"))
            for folder in (inside, *inside.parents):
                if (root / folder).is_dir():
                    yield root / folder


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
