"""The pool of native threads that all layers of a process share, and the calls into `experts.cpp`."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import ClassVar

import torch

from k26_plugins.common.experts.base import ExpertsError
from k26_plugins.common.experts.native.build import library
from k26_plugins.common.experts.native.cores import Core, cores
from k26_plugins.common.settings import cpu_threads_setting


class Layer(ctypes.Structure):
    """`Layer` of experts.cpp."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("w13", "w13_scale", "w2", "w2_scale")),
        *((name, ctypes.c_int64) for name in ("experts", "hidden", "inner")),
    ]


class Call(ctypes.Structure):
    """`Call` of experts.cpp."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("x", "ids", "weights", "map")),
        *((name, ctypes.c_int64) for name in ("map_size", "tokens", "top_k")),
        ("out", ctypes.c_void_p),
        ("out_is_float", ctypes.c_int64),
    ]


NO_MEMORY, BAD_ID = -1, -2  # as experts.cpp returns them


class Threads:
    """Threads pinned to cores. They run one job after the other, whoever submits it."""

    def __init__(self, native: ctypes.CDLL, chosen: Sequence[Core]) -> None:
        """Start a thread on each core; cores of a NUMA node stand side by side. Raises RuntimeError."""
        self.native = native
        self.process = os.getpid()
        self.count = len(chosen)
        native.k26_start.restype = ctypes.c_void_p
        for function in (native.k26_repack, native.k26_submit):
            function.restype = ctypes.c_int64
        numbers = ctypes.c_int32 * self.count
        pool = native.k26_start(
            numbers(*(core.cpu for core in chosen)), numbers(*(core.node for core in chosen)), ctypes.c_int64(self.count)
        )
        if pool is None:
            raise RuntimeError(f"no {self.count} threads for the native experts: raise the limit on processes (ulimit -u).")
        self.pool = ctypes.c_void_p(pool)

    def repack(self, layer: Layer) -> None:
        """Repack the layer's weights in place."""
        _checked(self.native.k26_repack(self.pool, ctypes.byref(layer)))

    def submit(self, layer: Layer, call: Call, tensors: tuple[torch.Tensor | None, ...]) -> Running:
        """Start a layer's work. `tensors` are kept until it is done. Raises ExpertsError, MemoryError."""
        job = _checked(self.native.k26_submit(self.pool, ctypes.byref(layer), ctypes.byref(call)))
        return Running(self, job, tensors)


class Running:
    """Work that was submitted. Dropping it waits too: until the work is done its tensors are in use."""

    def __init__(self, threads: Threads, job: int, tensors: tuple[torch.Tensor | None, ...]) -> None:
        self.threads, self.job, self.tensors = threads, job, tensors

    def wait(self) -> None:
        # In a child of fork the work is the parent's, and so are the threads.
        if self.threads.process == os.getpid():
            self.threads.native.k26_wait(self.threads.pool, ctypes.c_int64(self.job))

    def __del__(self) -> None:
        self.wait()


def _checked(result: int) -> int:
    if result == NO_MEMORY:
        raise MemoryError("no memory for the native experts' scratch.")
    if result == BAD_ID:
        raise ExpertsError("topk_ids or expert_map name an expert that the layer does not have.")
    return result


_process_threads: Threads | None = None
_starting = threading.Lock()


def process_threads() -> Threads:
    """The threads of this process, started at the first call and anew in a child of fork."""
    global _process_threads
    if _process_threads is None or _process_threads.process != os.getpid():
        with _starting:
            if _process_threads is None or _process_threads.process != os.getpid():
                _process_threads = Threads(library(), cores(cpu_threads_setting()))
    return _process_threads
