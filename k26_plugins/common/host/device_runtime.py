"""Call the CUDA or ROCm runtime for what torch does not offer: work of the host within a device's streams.

The module calls, by ctypes, the library that torch has loaded, so that the package links to no runtime.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

# The file name of either runtime, as torch loads it: libcudart.so.12, libamdhip64.so.6.
LIBRARY = re.compile(r"/lib(cudart|amdhip64)[^/]*\.so[.\d]*$")
# cudaStreamCaptureModeRelaxed and HIP's equal: this thread may allocate memory while it captures a graph.
RELAXED = 2
# Kinds of cudaMemcpy and hipMemcpy.
TO_DEVICE, TO_HOST = 1, 2


class DeviceRuntimeError(RuntimeError):
    """The runtime cannot be found, or one of its functions fails. The message names the function and the runtime's
    error.
    """


class DeviceRuntime:
    """The few functions of a CUDA or HIP runtime library that the core calls, with the library's prefix for their
    names.
    """

    def __init__(self, library: ctypes.CDLL, prefix: str, current_stream: Callable[[torch.device], int]) -> None:
        """Wrap a loaded library.

        prefix: "cuda" or "hip". current_stream: returns the handle of the stream that torch's next kernel on a device
        goes to.
        """
        self.current_stream = current_stream
        self._library, self._prefix = library, prefix
        self._text = getattr(library, f"{prefix}GetErrorString")
        self._text.restype = ctypes.c_char_p

    def is_capturing(self, stream: int) -> bool:
        """Return whether work that is put into the stream now is captured into a graph. Raises DeviceRuntimeError."""
        status = ctypes.c_int(0)
        self._call("StreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(status))
        return status.value != 0

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Allocate pinned host memory, uint8 `[nbytes]`, also while a graph is captured. Raises DeviceRuntimeError.

        The memory is never freed, because a graph may use it until the process ends.
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
        """Enqueue on the stream a copy of `source` to the beginning of `target`. Raises DeviceRuntimeError.

        source: contiguous, of any shape and dtype. target: at least as many bytes. to_host: the copy goes from the
        device to the host, else from the host to the device.
        """
        size, kind = ctypes.c_size_t(source.nbytes), ctypes.c_int(TO_HOST if to_host else TO_DEVICE)
        addresses = (ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr()))
        self._call("MemcpyAsync", *addresses, size, kind, ctypes.c_void_p(stream))

    def launch(self, stream: int, function: ctypes._NamedFuncPointer, argument: int) -> None:
        """Enqueue on the stream a call of a C function that takes one pointer, `argument`. Raises DeviceRuntimeError.

        The C function must not call the runtime.
        """
        self._call("LaunchHostFunc", ctypes.c_void_p(stream), function, ctypes.c_void_p(argument))

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, self._prefix + name)(*arguments)
        if error:
            raise DeviceRuntimeError(f"{self._prefix}{name} fails with {self._text(error).decode()} ({error}).")


@cache
def device_runtime() -> DeviceRuntime:
    """Return the runtime that torch has loaded in this process. Raises DeviceRuntimeError if torch has loaded none."""
    found = _loaded()
    if not found:
        raise DeviceRuntimeError("torch has loaded no runtime of CUDA or ROCm (libcudart, libamdhip64)")
    prefix = "hip" if "amdhip" in found[0].name else "cuda"
    return DeviceRuntime(
        ctypes.CDLL(str(found[0])), prefix, lambda device: torch.cuda.current_stream(device).cuda_stream
    )


def _loaded() -> list[Path]:
    """Return the files of CUDA or ROCm runtimes that this process has mapped."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[-1] for line in lines)
    return [Path(path) for path in dict.fromkeys(paths) if LIBRARY.search(path)]
