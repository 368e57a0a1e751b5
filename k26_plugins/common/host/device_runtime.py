"""The runtime of a CUDA or ROCm device, as far as work of the host's goes into a device's streams: by ctypes, from the
library that torch has loaded, so that nothing is linked to it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

# The file of either runtime, as torch loads it: libcudart.so.12, libamdhip64.so.6.
LIBRARY = re.compile(r"/lib(cudart|amdhip64)[^/]*\.so[.\d]*$")
# cudaStreamCaptureModeRelaxed, and hip's: what this thread allocates is no part of what it captures.
RELAXED = 2
TO_DEVICE, TO_HOST = 1, 2


class DeviceRuntimeError(RuntimeError):
    """The runtime refuses a call, or cannot be found. The message names the call and what the runtime says."""


class DeviceRuntime:
    """The few functions that are needed, of a library and in its names."""

    def __init__(self, library: ctypes.CDLL, prefix: str, current_stream: Callable[[torch.device], int]) -> None:
        """prefix: "cuda" or "hip". current_stream: the handle of the stream that torch's next kernel on a device goes to."""
        self.current_stream = current_stream
        self._library, self._prefix = library, prefix
        self._text = getattr(library, f"{prefix}GetErrorString")
        self._text.restype = ctypes.c_char_p

    def is_capturing(self, stream: int) -> bool:
        """Whether what is put into the stream now becomes a part of a graph."""
        status = ctypes.c_int(0)
        self._call("StreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(status))
        return status.value != 0

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host that the device copies by itself, uint8 `[nbytes]`; also while a graph is captured.

        It is there until the process ends: a graph may use it that long.
        """
        address = ctypes.c_void_p()
        allocate = "HostAlloc" if self._prefix == "cuda" else "HostMalloc"
        mode = ctypes.c_int(RELAXED)
        self._call("ThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            self._call(allocate, ctypes.byref(address), ctypes.c_size_t(nbytes), ctypes.c_uint(0))
        finally:
            self._call("ThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        assert address.value is not None, "the runtime gives memory or an error"
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address.value), dtype=torch.uint8)

    def copy(self, stream: int, target: torch.Tensor, source: torch.Tensor, *, to_host: bool) -> None:
        """Put a copy of all of `source`, which is contiguous, to the beginning of `target` into the stream."""
        size, kind = ctypes.c_size_t(source.nbytes), ctypes.c_int(TO_HOST if to_host else TO_DEVICE)
        addresses = (ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr()))
        self._call("MemcpyAsync", *addresses, size, kind, ctypes.c_void_p(stream))

    def launch(self, stream: int, function: ctypes._NamedFuncPointer, argument: int) -> None:
        """Put a call of a C function with one pointer into the stream. It must not call the runtime."""
        self._call("LaunchHostFunc", ctypes.c_void_p(stream), function, ctypes.c_void_p(argument))

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, self._prefix + name)(*arguments)
        if error:
            raise DeviceRuntimeError(f"{self._prefix}{name} fails with {self._text(error).decode()} ({error}).")


@cache
def device_runtime() -> DeviceRuntime:
    """The runtime that torch has loaded in this process. Raises DeviceRuntimeError."""
    found = _loaded()
    if not found:
        raise DeviceRuntimeError("torch has loaded no runtime of CUDA or ROCm (libcudart, libamdhip64)")
    prefix = "hip" if "amdhip" in found[0].name else "cuda"
    return DeviceRuntime(
        ctypes.CDLL(str(found[0])), prefix, lambda device: torch.cuda.current_stream(device).cuda_stream
    )


def _loaded() -> list[Path]:
    """The files of such a runtime that this process has mapped."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[-1] for line in lines)
    return [Path(path) for path in dict.fromkeys(paths) if LIBRARY.search(path)]
