"""Looks up what this adapter needs of kt-kernel, by the names of `names.py`."""

from __future__ import annotations

import re
from typing import Any

from k26_plugins.common.adapters.engine import Engine
from k26_plugins.common.host.cpu import cpu_flags
from k26_plugins.ktransformers import names

CHECKED_VERSIONS = "0.6.1 to 0.7.2"


ENGINE = Engine({"kt-kernel": CHECKED_VERSIONS}, "choose the core's experts with K26_CPU_EXPERTS=auto")
private = ENGINE.private
kt_kernel_version = ENGINE.release


def extension() -> Any:
    """Return the extension that was compiled for this CPU. Raises ImportError if kt-kernel cannot be imported."""
    return names.EXTENSION.look_up()


def ends_the_process() -> str | None:
    """Return why kt-kernel must not even be imported on this CPU, or None if it may be.

    Before 0.7 kt-kernel's code for AVX2 contains instructions of AVX512.
    """
    release = tuple(int(part) for part in re.findall(r"\d+", kt_kernel_version())[:2])
    if release and release < (0, 7) and "avx512f" not in cpu_flags():
        return f"kt-kernel {kt_kernel_version()} ends the process on a CPU without AVX512: install 0.7.0 or newer"
    return None


def raw_int4_class(group_size: int) -> Any:
    """Return kt-kernel's class for this CPU that takes the checkpoint's INT4 bytes as they are, or None."""
    if ENGINE.has(names.CHOOSE_RAW_INT4):
        return private(names.CHOOSE_RAW_INT4)(group_size)
    return private(names.RAW_INT4_ON_AMX) if private(names.CPU_VARIANT) == "amx" else None


# The names of kt-kernel's classes that copy the weights which they are given. AVX2RawInt4_MOE is not among them: in
# every release that has it, it computes from the addresses that it was given.
COPYING = ("AMXInt4_KGroup_MOE", "AMXInt4_KGroupBlocked_MOE", "AVXVNNI256RawInt4_MOE")


def copies_weights(raw_int4: Any) -> bool:
    """Return whether a class copies its weights, so that the tensors may be freed once it has loaded them.

    raw_int4: what `raw_int4_class` returned. For a class that is not known the answer is False.
    """
    return raw_int4.__name__ in COPYING


def cpu_infer(threads: int, numa_nodes: list[int]) -> Any:
    """Return kt-kernel's thread pools: one for each NUMA node, with `threads` threads in all.

    A process has one set of pools, which the first call creates; later calls return that set.
    """
    return private(names.CPU_INFER)(threads, len(numa_nodes), numa_nodes=numa_nodes)
