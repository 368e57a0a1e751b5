"""Plain reading of a checkpoint: what is held in memory is what was asked for, and nothing is read that was not.

The mapped reader (`reader.py`) leaves to the kernel which pages stay; here a run can say beforehand what it will hold.
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
    """The tensors of a checkpoint's folder, by name, each read from its file when it is asked for.

    May be used from several threads; `bytes_read` sums over them.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the headers. Raises ConfigError or CheckpointError."""
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
        """The tensor `name`, in memory of its own, in the table's dtype."""
        spec = self._spec(name)
        out = torch.empty(spec.shape, dtype=TORCH_DTYPES[self._place(name).dtype])
        self._read(name, 0, out)
        return out.to(TORCH_DTYPES[spec.dtype])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, along its first dimension."""
        spec = self._spec(name)
        out = torch.empty((stop - start, *spec.shape[1:]), dtype=TORCH_DTYPES[spec.dtype])
        self._read(name, start * (spec.num_bytes // spec.shape[0]), out)
        return out

    def head(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of a tensor in the table's dtype, fewer where it is smaller."""
        place = self._place(name)
        if place.dtype != self._spec(name).dtype:
            return self.tensor(name).view(torch.uint8).numpy().tobytes()[:num_bytes]
        return os.pread(place.descriptor, min(num_bytes, place.end - place.start), place.start)

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Sort tensors by where they lie: file by file, and within a file by their first byte."""
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
        # The pages would only push out what other processes use: each byte is wanted once.
        os.posix_fadvise(place.descriptor, place.start + offset, done, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self.bytes_read += done
