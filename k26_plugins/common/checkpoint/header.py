"""The headers of safetensors files: what a file says it holds, read without its weights."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
_SAVED_STATE = re.compile(r"model-rank-\d+-part-\d+\.safetensors")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class CheckpointError(ValueError):
    """A checkpoint that cannot be read. The message names the file or the tensor, and the remedy."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor as a file's header declares it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """First byte of the tensor's data, counted from the start of the file."""
    end: int
    """First byte after the tensor's data, counted from the start of the file."""


def read_header(file: Path) -> list[HeaderEntry]:
    """The tensors that a safetensors file declares. Raises CheckpointError where the header itself is damaged."""
    damaged = f"{file.name} is no whole safetensors file"
    remedy = "Download the file again."
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{damaged}: it has {len(prefix)} bytes. {remedy}")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{damaged}: its header claims {length} bytes. {remedy}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read ({error.strerror}). {remedy}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{damaged}: its header is not JSON ({error}). {remedy}") from error
    try:
        return [_entry(name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{damaged}: its header lacks {error}. {remedy}") from error


def _entry(name: str, fields: dict[str, Any], data_start: int) -> HeaderEntry:
    shape = tuple(int(size) for size in fields["shape"])
    start, end = (data_start + int(offset) for offset in fields["data_offsets"])
    return HeaderEntry(name, shape, str(fields["dtype"]), start, end)


def is_saved_state(files: list[Path]) -> bool:
    """Whether the files are an engine's `sharded_state`: its own parameters, rank by rank, under its own names."""
    return any(_SAVED_STATE.fullmatch(file.name) for file in files)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, else all in the folder."""
    index = folder / INDEX_FILE
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index.name} is damaged ({error}). Download it again.") from error
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file. Give the folder of a downloaded checkpoint.")
    return files
