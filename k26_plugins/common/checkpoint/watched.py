"""Detect that files change or become unreadable while they are loaded.

If a page of a mapped file cannot be read, because the file was truncated or because its disk or mount fails, the system
sends SIGBUS, which ends the process without a message. While files are watched, such a read yields zeros instead, in
whatever code it happens (a copy in torch, on any of its threads), and the load ends soon after with an error that names
the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from k26_plugins.common.checkpoint.header import CheckpointError

_SA_SIGINFO = 4
_MAP_FIXED = 0x10
_IN_PLACE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED


class _Action(ctypes.Structure):
    """`struct sigaction` of the C libraries of 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _Information(ctypes.Structure):
    """The beginning of `siginfo_t` for SIGBUS."""

    _fields_ = (("numbers", ctypes.c_int * 4), ("address", ctypes.c_void_p))


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_Information), ctypes.c_void_p)
_c = ctypes.CDLL(None)
_c.mmap.restype = ctypes.c_void_p
_c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_c.sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class WatchedFile:
    """An open file, with the state that it had when it was opened; used within `watched_files()`."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError."""
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        _files.append(self)
        found = os.fstat(self.descriptor)
        self.size = found.st_size
        self._state = _state(found)
        self._mapping: Callable[[], mmap.mmap | None] = lambda: None
        self._address, self._is_lost = 0, False

    def map(self) -> mmap.mmap:
        """Map the whole file; it is unmapped when neither the mapping nor a view of it is referenced any more."""
        # torch demands a buffer that is writable. A private mapping is, though nothing writes to it.
        mapping = mmap.mmap(self.descriptor, self.size, access=mmap.ACCESS_COPY)
        self._address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self._mapping = weakref.ref(mapping)
        return mapping

    def require_unchanged(self) -> None:
        """Raise CheckpointError with the file's name if the file vanished, was changed, or could not be read."""
        try:
            now = _state(self.path.stat())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} vanished while it was loaded ({error.strerror}): start again when it is back."
            ) from error
        if now != self._state:
            raise CheckpointError(f"{self.path} was changed while it was loaded: start again when it is whole.")
        if self._is_lost:
            raise CheckpointError(
                f"{self.path} could not be read while it was loaded: the disk or the mount has an error, see `dmesg`."
            )

    def replace_by_zeros(self, address: int) -> bool:
        """Replace the mapped file by zeros if `address` lies in its mapping.

        Return whether it lies there and the replacement succeeded.
        """
        if self._mapping() is None or not self._address <= address < self._address + self.size:
            return False
        self._is_lost = True
        return bool(_c.mmap(self._address, self.size, mmap.PROT_READ, _IN_PLACE, -1, 0) == self._address)


_files: list[WatchedFile] = []
"""The files that are watched in this process."""
_depth = 0
_before = _Action()
_entering = threading.Lock()


@contextmanager
def watched_files() -> Iterator[None]:
    """Watch the files that are opened within the block, and require at its end that all of them are unchanged.

    Blocks may be nested. Files stay watched until the outermost block ends, because an engine's threads may copy from a
    file after its last tensor was delivered. Raises CheckpointError.
    """
    global _depth
    with _entering:
        if _depth == 0:
            _c.sigaction(signal.SIGBUS, ctypes.byref(_OURS), ctypes.byref(_before))
        _depth += 1
    try:
        yield
        for file in _files:
            file.require_unchanged()
    finally:
        with _entering:
            _depth -= 1
            if _depth == 0:
                _c.sigaction(signal.SIGBUS, ctypes.byref(_before), None)
                while _files:
                    os.close(_files.pop().descriptor)


def _on_bus_error(number: int, information: ctypes._Pointer[_Information], context: int | None) -> None:
    # This signal handler runs in the middle of the read that failed; the read is repeated when the handler returns.
    address, is_ours = information.contents.address or 0, False
    try:
        is_ours = any(file.replace_by_zeros(address) for file in _files)
    finally:
        if not is_ours:
            # The repeated read raises SIGBUS again, which the previous handler receives.
            _c.sigaction(number, ctypes.byref(_before), None)


_handler = _Handler(_on_bus_error)
_OURS = _Action(ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
