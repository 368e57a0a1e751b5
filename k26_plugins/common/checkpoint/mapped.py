"""Map a checkpoint's files one by one, yield their tensors in the order of their bytes, and read ahead.

A rank touches only the rows that it keeps, so no byte is copied that the rank does not need. While a window of
neighbouring tensors is loaded or repacked, the system reads the following windows from the disk. `watched.py` detects
files that change meanwhile.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch

from k26_plugins.common.checkpoint.dtypes import TORCH_DTYPES
from k26_plugins.common.checkpoint.header import CheckpointError, HeaderEntry, read_header
from k26_plugins.common.checkpoint.watched import WatchedFile, watched_files

WINDOW_BYTES = 64 * 2**20
AHEAD_BYTES = 512 * 2**20
_DTYPES = TORCH_DTYPES | {"F16": torch.float16}
_START = HeaderEntry._fields.index("start")


class _File(WatchedFile):
    """A watched file whose header has been read.

    The constructor raises CheckpointError if the header cannot be read or the file is incomplete.
    """

    def __init__(self, path: Path) -> None:
        self.entries = sorted(read_header(path), key=itemgetter(_START))
        super().__init__(path)
        for name, shape, dtype, start, end in self.entries:
            if dtype not in _DTYPES:
                raise CheckpointError(f"{name} in {path} has dtype {dtype}, which this model has nowhere.")
            if _length(shape, dtype) != end - start:
                raise CheckpointError(f"{name} in {path} is not as long as its shape says: download it again.")
        if self.entries and self.entries[-1].end > self.size:
            raise CheckpointError(f"{self.entries[-1].name} ends after {path} does: download that file again.")

    def ask_for(self, entries: Iterable[HeaderEntry]) -> None:
        """Ask the system to read the bytes of these tensors, without waiting for them."""
        start = end = 0
        for entry in entries:
            if entry.start != end:
                self._ask_for(start, end)
                start = entry.start
            end = entry.end
        self._ask_for(start, end)

    def _ask_for(self, start: int, end: int) -> None:
        if start < end:
            os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


class _Window(NamedTuple):
    """Neighbouring tensors of a file."""

    entries: Sequence[HeaderEntry]

    @property
    def start(self) -> int:
        return self.entries[0].start

    @property
    def end(self) -> int:
        return self.entries[-1].end


def mapped_tensors(
    files: Sequence[Path],
    is_read: Callable[[str], bool] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the files with its name, as a view of the mapped file in the stored shape and dtype.

    is_read: returns whether the bytes of the named tensor will be touched; other tensors are not read ahead. By default
    all are. on_bytes: called with the length of each window once all its tensors were consumed. Raises CheckpointError
    with the file's name if a file is damaged, vanishes, or changes before its last tensor was consumed.
    """
    with watched_files():
        for path in files:
            file = _File(path)
            if file.entries:
                yield from _tensors(file, is_read, on_bytes, window_bytes)


def _tensors(
    file: _File, is_read: Callable[[str], bool] | None, on_bytes: Callable[[int], None], window_bytes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    mapping = file.map()
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    by_dtype: dict[str, torch.Tensor] = {}
    windows = _windows(file.entries, window_bytes)
    ahead = 0
    for window in windows:
        file.require_unchanged()
        while ahead < len(windows) and windows[ahead].start < window.end + AHEAD_BYTES:
            coming = windows[ahead].entries
            file.ask_for(coming if is_read is None else (entry for entry in coming if is_read(entry.name)))
            ahead += 1
        for name, shape, dtype, start, end in window.entries:
            typed = by_dtype.get(dtype)
            if typed is None:
                item = _DTYPES[dtype].itemsize
                typed = by_dtype[dtype] = whole[: len(whole) // item * item].view(_DTYPES[dtype])
            place, rest = divmod(start, typed.itemsize)
            if rest:
                yield name, whole[start:end].clone().view(_DTYPES[dtype]).view(shape)
            else:
                yield name, typed.as_strided(shape, _strides(shape), place)
        _let_go(mapping, window)
        on_bytes(window.end - window.start)
    file.require_unchanged()


@cache
def _length(shape: tuple[int, ...], dtype: str) -> int:
    """Return how many bytes a tensor occupies in its file."""
    return math.prod(shape) * _DTYPES[dtype].itemsize


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _let_go(mapping: mmap.mmap, window: _Window) -> None:
    """Remove the window's pages from the process's memory.

    A view that is still in use reads them from the file again.
    """
    start = -(-window.start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = window.end - start
    if length > 0:
        mapping.madvise(mmap.MADV_DONTNEED, start, length)


def _windows(entries: Sequence[HeaderEntry], window_bytes: int) -> list[_Window]:
    windows: list[_Window] = []
    first = 0
    for index, entry in enumerate(entries):
        if index > first and entry.end - entries[first].start > window_bytes:
            windows.append(_Window(entries[first:index]))
            first = index
    return [*windows, _Window(entries[first:])]
