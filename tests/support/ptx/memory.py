"""Models global and shared memory, with the checks of a sanitizer."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Lanes = np.ndarray[Any, np.dtype[Any]]


class PtxError(Exception):
    """The program broke a rule, or has an instruction that the interpreter does not know."""


def need_agreement(stored: Bytes, values: Bytes) -> None:
    """Refuse different values that threads store at one address, because no rule says which of them comes last."""
    if (stored != values).any():
        raise PtxError("threads write different values to one place at once")


class Global:
    """Global memory: the tensors that a kernel was given, at their own addresses. Nothing else may be touched."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.parts: list[tuple[int, int, Bytes]] = []
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            start = tensor.data_ptr()
            if size:
                data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
                self.parts.append((start, start + size, data))

    def places(self, addresses: Lanes, size: int) -> list[tuple[Lanes, Bytes, Lanes]]:
        """Return, for each tensor that is touched, the lanes that touch it, its bytes, and the lanes' offsets in it.

        Raises PtxError if an address is not aligned to `size` bytes or is outside all tensors.
        """
        if (addresses % size).any():
            raise PtxError(f"an access of {size} bytes is not aligned")
        found, left = [], np.ones(len(addresses), np.bool_)
        for start, end, data in self.parts:
            here = left & (addresses >= start) & (addresses + size <= end)
            if here.any():
                found.append((here, data, (addresses[here] - start)[:, None] + np.arange(size)))
                left &= ~here
                if not left.any():
                    return found
        if left.any():
            raise PtxError(f"{int(left.sum())} threads touch global memory outside every tensor")
        return found

    def load(self, addresses: Lanes, size: int) -> Bytes:
        out = np.empty((len(addresses), size), np.uint8)
        for here, data, offsets in self.places(addresses, size):
            out[here] = data[offsets]
        return out

    def store(self, addresses: Lanes, values: Bytes) -> None:
        for here, data, offsets in self.places(addresses, values.shape[1]):
            data[offsets] = values[here]
            need_agreement(data[offsets], values[here])


class Shared:
    """One program's shared memory. Accesses of two warps to the same bytes need a barrier between them, if one writes.

    For each byte it keeps the epoch (the number of barriers so far) in which the byte was last written and read, and
    the warp that did so, or MANY.
    """

    MANY = -2

    def __init__(self, size: int) -> None:
        # Real memory would hold whatever was there before; this pattern is NaN as bfloat16 and as float32.
        self.data = np.full(size, 0xFF, np.uint8)
        self.epoch = 1
        self.written = np.zeros(size, np.int32)
        self.writer = np.zeros(size, np.int32)
        self.was_read = np.zeros(size, np.int32)
        self.reader = np.zeros(size, np.int32)
        self.conflicts = 0
        """How many accesses to the banks were needed beyond those that the number of bytes makes necessary."""

    def barrier(self) -> None:
        """Begin a new epoch: accesses before the barrier conflict with none after it."""
        self.epoch += 1

    def offsets(self, addresses: Lanes, size: int) -> Lanes:
        if (addresses % size).any():
            raise PtxError(f"an access of {size} bytes to shared memory is not aligned")
        if (addresses < 0).any() or (addresses + size > len(self.data)).any():
            raise PtxError(f"shared memory has {len(self.data)} bytes, byte {int(addresses.max()) + size} is touched")
        offsets: Lanes = addresses[:, None] + np.arange(size)
        return offsets

    def note_read(self, offsets: Lanes, warps: Lanes) -> None:
        """Note a read, and raise PtxError if another warp wrote a byte since the last barrier.

        offsets: the bytes, `[lanes, bytes]`. warps: each lane's warp.
        """
        here = np.broadcast_to(warps[:, None], offsets.shape)
        if ((self.written[offsets] == self.epoch) & (self.writer[offsets] != here)).any():
            raise PtxError("shared memory is read that another warp wrote, and no barrier is between")
        others = (self.was_read[offsets] == self.epoch) & (self.reader[offsets] != here)
        self.reader[offsets] = np.where(others, self.MANY, here)
        # If lanes of several warps read one byte in this access, the assignment above left only the last of them.
        self.reader[offsets] = np.where(self.reader[offsets] != here, self.MANY, self.reader[offsets])
        self.was_read[offsets] = self.epoch

    def note_write(self, offsets: Lanes, warps: Lanes) -> None:
        """Note a write, and raise PtxError if another warp read or wrote a byte since the last barrier."""
        here = np.broadcast_to(warps[:, None], offsets.shape)
        if ((self.was_read[offsets] == self.epoch) & (self.reader[offsets] != here)).any():
            raise PtxError("shared memory is written that another warp read, and no barrier is between")
        if ((self.written[offsets] == self.epoch) & (self.writer[offsets] != here)).any():
            raise PtxError("two warps write one place of shared memory, and no barrier is between")
        self.writer[offsets] = here
        self.written[offsets] = self.epoch

    def note_atomic(self, offsets: Lanes, warps: Lanes) -> None:
        """Note atomic accesses, which need a barrier before any other access to the bytes, but none among
        themselves."""
        atomic = (self.written[offsets] == self.epoch) & (self.writer[offsets] == self.MANY)
        self.written[offsets] = np.where(atomic, 0, self.written[offsets])
        self.note_write(offsets, warps)
        self.writer[offsets] = self.MANY

    def count_conflicts(self, addresses: Lanes, size: int) -> None:
        """Add the bank conflicts of an access of `size` bytes by each lane.

        32 banks of 4 bytes serve up to 128 bytes of a warp at a time; a second word of one bank has to wait. If only
        some lanes take part, they are treated as neighbours.
        """
        lanes = min(32, 128 // size)
        padded = np.pad(addresses, (0, -len(addresses) % lanes), mode="edge")
        words = (padded.reshape(-1, lanes, 1) + np.arange(0, size, 4)).reshape(len(padded) // lanes, -1) // 4
        words.sort(axis=1)
        first = np.ones(words.shape, np.bool_)
        first[:, 1:] = words[:, 1:] != words[:, :-1]
        served = np.zeros((len(words), 32), np.int64)
        np.add.at(served, (np.nonzero(first)[0], words[first] % 32), 1)
        self.conflicts += int((served.max(axis=1) - -(-first.sum(axis=1) // 32)).sum())

    def load(self, addresses: Lanes, size: int, warps: Lanes) -> Bytes:
        offsets = self.offsets(addresses, size)
        self.note_read(offsets, warps)
        self.count_conflicts(addresses, size)
        return self.data[offsets]

    def store(self, addresses: Lanes, values: Bytes, warps: Lanes) -> None:
        offsets = self.offsets(addresses, values.shape[1])
        self.note_write(offsets, warps)
        self.count_conflicts(addresses, values.shape[1])
        self.data[offsets] = values
        need_agreement(self.data[offsets], values)
