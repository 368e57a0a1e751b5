"""Read the headers of safetensors files: what a file declares that it holds, without its weights."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from k26_plugins.common.host.collector import paused

INDEX_FILE = "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or is damaged. The message names the file or the tensor, and the remedy."""


class HeaderEntry(NamedTuple):
    """A tensor as the header of a file declares it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """First byte of the tensor's data, counted from the start of the file."""
    end: int
    """First byte after the tensor's data, counted from the start of the file."""


def read_header(file: Path) -> list[HeaderEntry]:
    """Return the tensors that a safetensors file declares.

    Raises CheckpointError if the file cannot be read or its header is damaged.
    """
    damaged = f"{file.name} is no whole safetensors file"
    remedy = "Download the file again."
    cause = {
        errno.EACCES: "let this user read it: chmod, or start as its owner.",
        errno.ENOENT: "download it.",
        errno.EIO: "the disk or the mount has an error: see `dmesg`.",
    }
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if POINTER.startswith(prefix) and len(prefix) == 8:
                raise CheckpointError(
                    f"{file.name} is a Git LFS pointer of {file.stat().st_size} bytes, not the file: `git lfs pull`, or "
                    f"`hf download`."
                )
            if len(prefix) < 8:
                raise CheckpointError(f"{damaged}: it has {len(prefix)} bytes. {remedy}")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{damaged}: its header claims {length} bytes. {remedy}")
            text = stream.read(length)
    except OSError as error:
        remedy = cause.get(error.errno or 0, "see what the system says of it.")
        raise CheckpointError(f"{file.name} cannot be read ({error.strerror}): {remedy}") from error
    with paused():
        try:
            header = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{damaged}: its header is not JSON ({error}). {remedy}") from error
        try:
            entries = [_entry(name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"]
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{damaged}: its header lacks {error}. {remedy}") from error
        # Deleted while the garbage collector is paused, which would otherwise traverse these thousands of objects.
        del header
        return entries


def _entry(name: str, fields: dict[str, Any], data_start: int) -> HeaderEntry:
    start, end = fields["data_offsets"]
    shape = tuple(map(int, fields["shape"]))
    return HeaderEntry(name, shape, str(fields["dtype"]), data_start + int(start), data_start + int(end))


def index_of(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor from the index, or an empty dict if there is no index.

    Raises CheckpointError.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return {}
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name} is damaged ({error}). Download it again.") from error


def weight_files(folder: Path, index: dict[str, str] | None = None) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    They are the files that the index names, or all in the folder if there is no index. index: the result of `index_of`,
    if it was called already. Raises CheckpointError if there are no files or the index is damaged.
    """
    if (folder / INDEX_FILE).exists():
        return [folder / name for name in sorted(set((index_of(folder) if index is None else index).values()))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file. Give the folder of a downloaded checkpoint.")
    return files
