"""Measure how fast this machine moves weights: from its memory, to its GPUs, and from the checkpoint's disk.

All of these measurements together take seconds.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Barrier

import numpy as np
import torch

from k26_plugins.common.host.cores import Core, cores
from k26_plugins.common.host.memory import available_bytes
from k26_plugins.operate.doctor.finding import Finding, Level

ROUNDS = 3
PATIENCE = 60.0  # seconds after which a thread that has not finished its read counts as lost
MIN_BUFFER, COPIED = 2**28, 2**28
CACHES = Path("/sys/devices/system/cpu")
BLOCK, READERS, READ_SECONDS = 2**24, 8, 2.0
# The size of the published checkpoint, from which a finding says how long loading takes at the measured rate.
PUBLISHED_BYTES = 595_148_192_736


def bandwidth_findings(checkpoint: Path | None) -> list[Finding]:
    """Return the measured rates of memory, of each GPU's link and, with a checkpoint, of the checkpoint's disk."""
    findings = [memory_finding()]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        rate = copy_rate([index])
        findings.append(Finding(Level.OK, f"GPU {index} link", f"{rate / 1e9:.1f} GB/s from pinned host memory"))
    if checkpoint is not None and any(checkpoint.glob("*.safetensors")):
        try:
            rate, how = disk_rate(checkpoint)
        except OSError as error:
            return [*findings, Finding(Level.NOTE, "disk", f"cannot be read: {error}")]
        if not rate:
            return findings  # The files are empty: `checkpoint_findings` reports that.
        minutes = PUBLISHED_BYTES / rate / 60
        detail = f"{rate / 1e9:.2f} GB/s {how}: the published checkpoint takes at least {minutes:.1f} minutes to load"
        findings.append(Finding(Level.OK, "disk", detail))
    return findings


def memory_finding() -> Finding:
    """Return the rate at which all cores of this process read memory together.

    If there are several NUMA nodes, the finding also has the rate of each node alone, reading its own memory.
    """
    found = cores()
    nodes = sorted({core.node for core in found})
    detail = f"{memory_rate(found) / 1e9:.0f} GB/s read, {len(found)} cores"
    if len(nodes) > 1:
        rates = {node: memory_rate([core for core in found if core.node == node]) for node in nodes}
        detail += f" ({', '.join(f'node {node} alone {rate / 1e9:.0f}' for node, rate in rates.items())})"
    return Finding(Level.OK, "memory bandwidth", detail)


def memory_rate(chosen: Sequence[Core]) -> float:
    """Return the bytes per second that these cores read together, one thread on each; the best of a few rounds.

    Each thread reads a buffer that it wrote itself, so the buffer is on the thread's NUMA node.
    """
    size = beyond_caches() // len(chosen) // 8
    meeting = Barrier(len(chosen) + 1, timeout=PATIENCE)

    def read(core: Core) -> None:
        with suppress(OSError):  # The core may have been taken from this process's control group meanwhile.
            os.sched_setaffinity(0, {core.cpu})
        words = np.ones(size, dtype=np.int64)
        for _ in range(ROUNDS + 1):
            meeting.wait()
            words.sum()
            meeting.wait()

    def round_() -> None:
        meeting.wait()
        meeting.wait()

    with ThreadPoolExecutor(len(chosen)) as pool:
        running = [pool.submit(read, core) for core in chosen]
        best = min(_timed(round_) for _ in range(ROUNDS + 1))
        for thread in running:
            thread.result()
    return size * 8 * len(chosen) / best


def beyond_caches() -> int:
    """Return a buffer size in bytes of which the caches keep little from one read to the next.

    The size is at most a quarter of the available memory.
    """
    return min(max(MIN_BUFFER, 4 * last_level_caches()), available_bytes() // 4)


def last_level_caches() -> int:
    """Return the bytes of all L3 caches together, each counted once; 0 if the kernel lists none.

    A buffer that fits in these caches would be read from them and not from memory.
    """
    found = {}
    for cache in CACHES.glob("cpu[0-9]*/cache/index3"):
        try:
            size = (cache / "size").read_text().strip()
            found[(cache / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return sum(found.values())


def copy_rate(gpus: Sequence[int]) -> float:
    """Return the bytes per second from pinned host memory to these GPUs, all at once and summed over the GPUs."""
    devices = [torch.device("cuda", index) for index in gpus]
    source = torch.ones(COPIED, dtype=torch.uint8).pin_memory()
    targets = [torch.empty_like(source, device=device) for device in devices]

    def copy() -> None:
        for target in targets:
            target.copy_(source, non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)

    return COPIED * len(targets) / min(_timed(copy) for _ in range(ROUNDS + 1))


def disk_rate(folder: Path) -> tuple[float, str]:
    """Return the bytes per second at which the checkpoint's files are read, and a text that says how they were read.

    The files are read with O_DIRECT, past the page cache, or through the page cache if O_DIRECT fails. Raises OSError
    if they cannot be read at all.
    """
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size, reverse=True)
    try:
        return _disk_rate(files, os.O_DIRECT), "past the cache"
    except OSError:
        return _disk_rate(files, 0), "(this file system does not read past the cache: some may have been in it)"


def _disk_rate(files: list[Path], flags: int) -> float:
    pieces = SimpleQueue[tuple[Path, int]]()
    for file in files:
        for start in range(0, file.stat().st_size, BLOCK):
            pieces.put((file, start))
    end = time.perf_counter() + READ_SECONDS

    def read() -> int:
        done, buffer = 0, mmap.mmap(-1, BLOCK)  # O_DIRECT needs a buffer that is aligned to pages.
        with suppress(Empty):
            while time.perf_counter() < end:
                file, start = pieces.get_nowait()
                descriptor = os.open(file, os.O_RDONLY | flags)
                try:
                    done += os.preadv(descriptor, [buffer], start)
                finally:
                    os.close(descriptor)
        return done

    begin = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        done = sum(future.result() for future in [pool.submit(read) for _ in range(READERS)])
    return done / (time.perf_counter() - begin)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
