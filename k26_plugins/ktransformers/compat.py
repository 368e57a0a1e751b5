"""What this adapter looks up in kt-kernel, by the names of `names.py`."""

from __future__ import annotations

import re
from typing import Any

from k26_plugins.common.adapters.engine import Engine
from k26_plugins.common.experts.native.build import cpu_flags
from k26_plugins.ktransformers import names

CHECKED_VERSIONS = "0.6.1 to 0.7.2"


ENGINE = Engine({"kt-kernel": CHECKED_VERSIONS}, "choose the core's experts with K26_CPU_EXPERTS=auto")
private = ENGINE.private
kt_kernel_version = ENGINE.release


def extension() -> Any:
    """The compiled extension for this CPU. Raises ImportError where kt-kernel cannot be imported."""
    return names.EXTENSION.look_up()


def ends_the_process() -> str | None:
    """Why kt-kernel must not even be imported on this CPU, or None: before 0.7 its code for AVX2 has AVX512's in it."""
    release = tuple(int(part) for part in re.findall(r"\d+", kt_kernel_version())[:2])
    if release and release < (0, 7) and "avx512f" not in cpu_flags():
        return f"kt-kernel {kt_kernel_version()} ends the process on a CPU without AVX512: install 0.7.0 or newer"
    return None


def raw_int4_class(group_size: int) -> Any:
    """The class for this CPU that takes the checkpoint's INT4 bytes as they are, or None."""
    if ENGINE.has(names.CHOOSE_RAW_INT4):
        return private(names.CHOOSE_RAW_INT4)(group_size)
    return private(names.RAW_INT4_ON_AMX) if private(names.CPU_VARIANT) == "amx" else None


# Its classes that copy what they are given. AVX2RawInt4_MOE computes from the addresses, in every release that has it.
COPYING = ("AMXInt4_KGroup_MOE", "AMXInt4_KGroupBlocked_MOE", "AVXVNNI256RawInt4_MOE")


def copies_weights(raw_int4: Any) -> bool:
    """Whether the tensors may go once a class of `raw_int4_class` has loaded them. One that is not known keeps them."""
    return raw_int4.__name__ in COPYING


def cpu_infer(threads: int, numa_nodes: list[int]) -> Any:
    """kt-kernel's thread pools, one for each memory node and `threads` in all. The first call decides for the process."""
    return private(names.CPU_INFER)(threads, len(numa_nodes), numa_nodes=numa_nodes)
