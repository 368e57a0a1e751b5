"""Choose the cores on which the threads of the experts run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from k26_plugins.common.host.control_groups import cpu_quota

CPUS = Path("/sys/devices/system/cpu")
_share: int | None = None


class Core(NamedTuple):
    """A physical core: its NUMA node, and the first of its CPUs (hardware threads) that this process may use."""

    node: int
    cpu: int


def share(number: int) -> None:
    """Set the default limit of `cores`.

    number: this rank's part of the cores that the user allowed for the experts.
    """
    global _share
    _share = number


def cores(limit: int | None = None) -> list[Core]:
    """Return the physical cores that this process may use, sorted by NUMA node.

    limit: the largest number of cores, taken evenly from the nodes; by default what `share` set, else all. A control
    group's CPU quota limits the number too: threads beyond the quota would be suspended in the middle of their work,
    and all others would wait for them.
    """
    limit = limit or _share
    quota = cpu_quota()
    if quota is not None:
        limit = min(max(round(quota), 1), limit or sys.maxsize)
    seen: set[str] = set()
    found: dict[int, list[Core]] = {}
    for cpu in sorted(allowed_cpus()):
        siblings = _read(CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        if siblings not in seen:
            seen.add(siblings)
            node = _node(cpu)
            found.setdefault(node, []).append(Core(node, cpu))
    evenly = chain.from_iterable(zip_longest(*found.values()))
    return sorted([core for core in evenly if core is not None][:limit])


def allowed_cpus() -> set[int]:
    """Return the CPUs that this process may use.

    An engine that runs on CPUs pins each thread of a rank to a single CPU, the calling thread too. If the calling
    thread is pinned, the rank's CPUs are those of all threads that are pinned to one CPU.
    """
    mine = os.sched_getaffinity(0)
    pinned = [cpus for cpus in _affinities() if len(cpus) == 1]
    return mine if len(mine) > 1 else mine.union(*pinned)


def _affinities() -> list[set[int]]:
    """Return the set of allowed CPUs of each thread of this process."""
    found: list[set[int]] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # the thread has ended
            found.append(os.sched_getaffinity(int(task.name)))
    return found


def _node(cpu: int) -> int:
    return next((int(entry.name[4:]) for entry in (CPUS / f"cpu{cpu}").glob("node[0-9]*")), 0)


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
