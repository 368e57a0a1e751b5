"""Which cores the threads of the experts run on."""

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
    """A physical core by the first of its CPUs that this process may use."""

    node: int
    cpu: int


def share(number: int) -> None:
    """Have this process' experts run on `number` cores where no limit is given: a rank's part of what a user allowed."""
    global _share
    _share = number


def cores(limit: int | None = None) -> list[Core]:
    """The physical cores of this process, one NUMA node after the other; at most `limit`, taken evenly from the nodes.

    No more than a control group gives time for: threads beyond it are stopped in the middle of their work, and the
    others wait for them.
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
    """The CPUs of this process.

    An engine that runs on CPUs pins each thread of its rank to one, this one among them: then the rank's CPUs are those
    of all threads that are pinned so.
    """
    mine = os.sched_getaffinity(0)
    pinned = [cpus for cpus in _affinities() if len(cpus) == 1]
    return mine if len(mine) > 1 else mine.union(*pinned)


def _affinities() -> list[set[int]]:
    """The CPUs of each thread of this process."""
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
