"""Run the native experts on a process' threads: choose which threads work, and call the functions of `experts.cpp`."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import ClassVar

import torch

from k26_plugins.common.experts.base import ExpertsError
from k26_plugins.common.experts.native.build import library
from k26_plugins.common.host.cores import Core, cores
from k26_plugins.common.settings import CPU_THREADS


class Layer(ctypes.Structure):
    """`Layer` of layer.hpp."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("w13", "w13_scale", "w2", "w2_scale")),
        *((name, ctypes.c_int64) for name in ("experts", "hidden", "inner")),
    ]


class Call(ctypes.Structure):
    """`Call` of layer.hpp."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("x", "ids", "weights", "map")),
        *((name, ctypes.c_int64) for name in ("map_size", "tokens", "top_k")),
        ("out", ctypes.c_void_p),
        ("out_is_float", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
    ]


NO_MEMORY = -1  # as experts.cpp returns it
NO_SCRATCH = "no memory for the native experts' scratch."

# The library's team is torch's OpenMP threads, which do not survive a fork. Neither do torch's own operators.
_imported_in = os.getpid()


class Threads:
    """The threads of a process that compute experts.

    torch's threads do work that the caller waits for; the library's own pinned threads do work that runs meanwhile.
    """

    def __init__(self, native: ctypes.CDLL, pool: Sequence[Core] | None = None, team: int | None = None) -> None:
        """pool: the cores of the library's own threads, with those of a NUMA node side by side; by default all cores
        that the process may use.

        team: how many of torch's threads work, 0 for none; by default as many as torch uses. Raises ValueError for a
        setting that is no number of threads, and MemoryError.
        """
        self.native = native
        self.process = os.getpid()
        native.k26_create.restype = native.k26_stream_call.restype = ctypes.c_void_p
        native.k26_instruction_set.restype = ctypes.c_char_p
        for name in ("has_team", "start", "repack", "run", "submit", "stream_late"):
            native[f"k26_{name}"].restype = ctypes.c_int64
        created = native.k26_create()
        if created is None:
            raise MemoryError("no memory for the native experts.")
        self._process = ctypes.c_void_p(created)
        self._team = team
        self._has_team = self.process == _imported_in and bool(native.k26_has_team(self._process))
        self._cores = pool or cores(CPU_THREADS.read())
        self._pool_started = False
        self._starting = threading.Lock()

    @property
    def instruction_set(self) -> str:
        """The instruction set that the library was compiled for, such as "AVX512 with VNNI"."""
        name: bytes = self.native.k26_instruction_set()
        return name.decode()

    @property
    def team(self) -> int:
        """How many of torch's threads do the work that is waited for; 0 if the library's own threads do it."""
        if not self._has_team:
            return 0
        if self._team is not None:
            return self._team
        # An engine that computes on a GPU leaves torch one thread; then the library's own threads do the work.
        count = torch.get_num_threads()
        return 0 if count == 1 and len(self._cores) > 1 else count

    def start_pool(self) -> None:
        """Start the library's own threads unless they run. Raises RuntimeError if the system gives no more threads."""
        with self._starting:
            if self._pool_started:
                return
            chosen = self._cores
            numbers = ctypes.c_int32 * len(chosen)
            started = self.native.k26_start(
                self._process,
                numbers(*(core.cpu for core in chosen)),
                numbers(*(core.node for core in chosen)),
                ctypes.c_int64(len(chosen)),
            )
            if not _checked(started):
                raise RuntimeError(f"no {len(chosen)} threads for the native experts: raise the limit (ulimit -u).")
            self._pool_started = True

    def place(self, layer: Layer) -> None:
        """Give a layer's new memory its pages: huge pages, each on the NUMA node that will read it.

        What the memory holds is lost.
        """
        # It is not known on which node each of torch's threads runs.
        on_several_nodes = len({core.node for core in self._cores}) > 1
        team = self._team_or_pool(0 if on_several_nodes else self.team)
        self.native.k26_place(self._process, ctypes.byref(layer), team)

    def repack(self, layer: Layer) -> None:
        """Repack the layer's weights in place."""
        _checked(self.native.k26_repack(self._process, ctypes.byref(layer), self._team_or_pool(self.team)))

    def _team_or_pool(self, team: int) -> ctypes.c_int64:
        """Return `team` as the library takes it: for 0 it uses its own threads, which are started here."""
        if not team:
            self.start_pool()
        return ctypes.c_int64(team)

    def run(self, layer: Layer, call: Call) -> None:
        """Do a layer's work and wait for it. Raises MemoryError, or RuntimeError as `start_pool` does."""
        team = self._team_or_pool(self.team)
        _checked(self.native.k26_run(self._process, ctypes.byref(layer), ctypes.byref(call), team))

    def submit(self, layer: Layer, call: Call, tensors: tuple[torch.Tensor | None, ...]) -> Running:
        """Start a layer's work. `tensors` are kept alive until it is done. Raises as `run` does."""
        self.start_pool()
        job = _checked(self.native.k26_submit(self._process, ctypes.byref(layer), ctypes.byref(call)))
        return Running(self, job, tensors)

    def stream_call(self, layer: Layer, call: Call, patience: float) -> int:
        """Return the argument of `k26_stream_submit` and `k26_stream_wait`, which is valid until the process ends.

        The memory that `layer` and `call` point to must live as long as these functions are called with it. patience:
        seconds that the work may take. Raises as `run` does.
        """
        self.start_pool()
        limit = ctypes.c_int64(int(patience * 1e9))
        made: int | None = self.native.k26_stream_call(self._process, ctypes.byref(layer), ctypes.byref(call), limit)
        if made is None:
            raise MemoryError(NO_SCRATCH)
        return made

    def check_streams(self) -> None:
        """Raise ExpertsError if work in a device's stream did not end in time, because its result is then no answer."""
        if self.native.k26_stream_late(self._process):
            raise ExpertsError(
                "the CPU's experts did not end a layer's work in time, and a thread of theirs may hang: restart the server, "
                "and see whether the machine swaps or another process holds its cores."
            )

    def wait(self, job: int) -> None:
        """Wait for a job of `submit`; in a forked child return at once."""
        # In a forked child both the work and the threads are the parent's.
        if self.process == os.getpid():
            self.native.k26_wait(self._process, ctypes.c_int64(job))


class Running:
    """Work that was submitted. Dropping this object waits too, because the work uses its tensors until it is done."""

    def __init__(self, threads: Threads, job: int, tensors: tuple[torch.Tensor | None, ...]) -> None:
        self._threads, self._job, self._tensors = threads, job, tensors

    def wait(self) -> None:
        """Wait until the work is done; a second call returns at once."""
        self._threads.wait(self._job)

    def __del__(self) -> None:
        self.wait()


def _checked(result: int) -> int:
    if result == NO_MEMORY:
        raise MemoryError(NO_SCRATCH)
    return result


_process_threads: Threads | None = None
_creating = threading.Lock()


def process_threads() -> Threads:
    """Return the threads of this process; a forked child gets its own."""
    global _process_threads
    if _process_threads is None or _process_threads.process != os.getpid():
        with _creating:
            if _process_threads is None or _process_threads.process != os.getpid():
                _process_threads = Threads(library())
    return _process_threads
