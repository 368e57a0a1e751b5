"""Read a checkpoint with plain reads, so that memory holds only the tensors that were asked for.

With the mapped reader (`reader.py`), the kernel decides which pages stay in memory. With this one, a run can tell in
advance how much memory it will use.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

import torch

from k26_plugins.common.checkpoint.dtypes import TORCH_DTYPES
from k26_plugins.common.checkpoint.fault import compare
from k26_plugins.common.checkpoint.header import CheckpointError, read_header, weight_files
from k26_plugins.common.checkpoint.table import TensorSpec, tensor_table
from k26_plugins.common.model.config import K26Config


class _Place(NamedTuple):
    descriptor: int
    start: int
    end: int
    file: str
    dtype: str


class StreamedCheckpoint:
    """The tensors of a checkpoint's folder, by name; each is read from its file when it is asked for.

    An object may be used from several threads; `bytes_read` counts the bytes that all of them read.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the configuration and the headers. Raises ConfigError or CheckpointError."""
        self.folder = Path(folder)
        self.config = K26Config.from_path(self.folder)
        self.table: dict[str, TensorSpec] = tensor_table(self.config)
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._places: dict[str, _Place] = {}
        for path in weight_files(self.folder):
            entries = read_header(path)
            descriptor = os.open(path, os.O_RDONLY)
            self._descriptors.append(descriptor)
            size = path.stat().st_size
            for entry in entries:
                problem = compare(entry.name, entry.shape, entry.dtype, self.table.get(entry.name))
                if problem:
                    raise CheckpointError(f"{entry.name} {problem.message}")
                if entry.end > size:
                    raise CheckpointError(f"{entry.name} ends after {path.name} does: download that file again.")
                self._places[entry.name] = _Place(descriptor, entry.start, entry.end, path.name, entry.dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor `name` in the table's shape and dtype, in host memory of its own.

        Raises CheckpointError.
        """
        spec = self._spec(name)
        out = torch.empty(spec.shape, dtype=TORCH_DTYPES[self._place(name).dtype])
        self._read(name, 0, out)
        return out.to(TORCH_DTYPES[spec.dtype])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` (exclusive) of a tensor along its first dimension, `[stop − start, …]`.

        The rows have the table's dtype and host memory of their own. Raises CheckpointError.
        """
        spec = self._spec(name)
        out = torch.empty((stop - start, *spec.shape[1:]), dtype=TORCH_DTYPES[spec.dtype])
        self._read(name, start * (spec.num_bytes // spec.shape[0]), out)
        return out

    def head(self, name: str, num_bytes: int) -> bytes:
        """Return the first `num_bytes` bytes of a tensor in the table's dtype, or all of a smaller one.

        Raises CheckpointError.
        """
        place = self._place(name)
        if place.dtype != self._spec(name).dtype:
            return self.tensor(name).view(torch.uint8).numpy().tobytes()[:num_bytes]
        return os.pread(place.descriptor, min(num_bytes, place.end - place.start), place.start)

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return the names sorted by where their tensors are: by file, then by the first byte.

        Raises CheckpointError.
        """
        return sorted(names, key=lambda name: self._place(name)[:2])

    def _spec(self, name: str) -> TensorSpec:
        self._place(name)
        return self.table[name]

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"{name} is missing from {self.folder}. Run `k26 check` for the whole list.")
        return place

    def _read(self, name: str, offset: int, out: torch.Tensor) -> None:
        place = self._place(name)
        view = memoryview(out.view(-1).view(torch.uint8).numpy().data)
        done = 0
        while done < len(view):
            count = os.preadv(place.descriptor, [view[done:]], place.start + offset + done)
            if count <= 0:
                raise CheckpointError(f"{place.file} ends within {name}: download that file again.")
            done += count
        # Each byte is read once, so its pages leave the page cache, where they would displace what other processes use.
        os.posix_fadvise(place.descriptor, place.start + offset, done, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self.bytes_read += done
