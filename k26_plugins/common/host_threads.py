"""The host's cores and memory nodes that this process may use for experts."""

from __future__ import annotations

import os
from pathlib import Path

THREADS_VARIABLE = "K26_CPU_THREADS"
_NODES = Path("/sys/devices/system/node")


def host_threads() -> int:
    """K26_CPU_THREADS, or the cores that this process is bound to. Raises ValueError for what is no number above 0."""
    text = os.environ.get(THREADS_VARIABLE)
    if text is None:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(
            f"{THREADS_VARIABLE} is {text!r}: give the number of threads for experts on the CPU, or unset it."
        )
    return int(text)


def numa_nodes() -> list[int]:
    """The memory nodes of the cores that this process is bound to; [0] where the kernel tells none."""
    cores = os.sched_getaffinity(0)
    found = []
    for folder in sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        if cores & _cores(folder / "cpulist"):
            found.append(int(folder.name[4:]))
    return found or [0]


def _cores(cpulist: Path) -> set[int]:
    """The kernel's `0-3,8` as a set."""
    cores: set[int] = set()
    for part in cpulist.read_text().strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
    return cores
