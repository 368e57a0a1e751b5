"""Tests of the memory and CPU time that control groups of versions 1 and 2 allow. The tests write the groups' files as
the kernel writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from k26_plugins.common.host import control_groups, cores
from k26_plugins.common.host import memory as host_memory

GIB = 2**30
Groups = Callable[..., None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Return a function that writes a /proc/self/cgroup and files below /sys/fs/cgroup, by their paths. The machine has
    1,000 GiB free."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal: {2000 * GIB // 1024} kB\nMemAvailable: {1000 * GIB // 1024} kB\n"
    )
    monkeypatch.setattr(control_groups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(control_groups, "ROOT", tmp_path / "sys")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "proc" / "meminfo")

    def write(cgroup: str, **files: str | int) -> None:
        (tmp_path / "proc" / "cgroup").write_text(cgroup)
        for name, content in files.items():
            file = tmp_path / "sys" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")

    return write


def stat(inactive: int, active: int, prefix: str = "") -> str:
    return f"anon 5\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\nsock 0"


def test_file_cache_is_not_in_use(groups: Groups) -> None:
    """Reading a checkpoint has left 685 GiB of file cache in a group of 700 GiB. The kernel counts 695 GiB as used, but
    the cache can be dropped, so that 690 GiB are available."""
    limits = {"memory.max": 700 * GIB, "memory.current": 695 * GIB, "memory.stat": stat(600 * GIB, 85 * GIB)}
    groups("0::/\n", **limits)
    assert host_memory.total_bytes() == 700 * GIB
    assert host_memory.available_bytes() == 690 * GIB


def test_the_tightest_of_a_groups_ancestors_counts(groups: Groups) -> None:
    groups(
        "0::/user.slice/job.service/worker\n",
        **{
            "user.slice/memory.max": 400 * GIB,
            "user.slice/memory.current": 390 * GIB,
            "user.slice/memory.stat": stat(0, 0),
            "user.slice/job.service/memory.max": 100 * GIB,
            "user.slice/job.service/memory.current": 10 * GIB,
            "user.slice/job.service/worker/memory.max": "max",
            "user.slice/cpu.max": "150000 100000",
            "user.slice/job.service/cpu.max": "50000 100000",
            "user.slice/job.service/worker/cpu.max": "max 100000",
        },
    )
    assert host_memory.total_bytes() == 100 * GIB
    assert host_memory.available_bytes() == 10 * GIB
    assert control_groups.cpu_quota() == 0.5


def test_a_use_that_is_not_told(groups: Groups) -> None:
    groups("0::/\n", **{"memory.max": 50 * GIB})
    assert host_memory.available_bytes() == 50 * GIB


def test_version_1(groups: Groups) -> None:
    groups(
        "12:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/docker/abc\n",
        **{
            "memory/docker/abc/memory.limit_in_bytes": 64 * GIB,
            "memory/docker/abc/memory.usage_in_bytes": 60 * GIB,
            "memory/docker/abc/memory.stat": stat(40 * GIB, 10 * GIB, "total_"),
            # This is how the kernel writes that there is no limit.
            "memory/memory.limit_in_bytes": 9223372036854771712,
            "memory/memory.usage_in_bytes": 900 * GIB,
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": 250000,
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": 100000,
            "cpu,cpuacct/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/cpu.cfs_period_us": 100000,
        },
    )
    assert host_memory.total_bytes() == 64 * GIB
    assert host_memory.available_bytes() == 54 * GIB
    assert control_groups.cpu_quota() == 2.5


def test_a_container_that_sees_its_own_group_as_the_root(groups: Groups) -> None:
    """In a container /proc/self/cgroup names the host's path, which does not exist there."""
    groups("4:memory:/docker/abc\n", **{"memory/memory.limit_in_bytes": 8 * GIB, "memory/memory.usage_in_bytes": GIB})
    assert host_memory.available_bytes() == 7 * GIB


def test_no_control_groups(groups: Groups) -> None:
    groups("0::/\n")
    assert host_memory.total_bytes() == 2000 * GIB
    assert host_memory.available_bytes() == 1000 * GIB
    assert control_groups.cpu_quota() is None


def test_no_more_threads_than_there_is_time_for(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cores, "allowed_cpus", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "CPUS", tmp_path / "no topology: every CPU is a core")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    groups("0::/\n")
    assert len(cores.cores()) == control_groups.usable_cpus() == 4
    for quota, count in (("50000 100000", 1), ("200000 100000", 2), ("800000 100000", 4)):
        groups("0::/\n", **{"cpu.max": quota})
        assert len(cores.cores()) == control_groups.usable_cpus() == count
        assert len(cores.cores(1)) == 1
