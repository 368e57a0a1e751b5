"""Write safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

# safetensors' names of the dtypes, in the order in which safetensors writes tensors of these dtypes to a file.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write tensors to `file`, which is either complete or absent, whenever the process is killed.

    The tensors are in host memory and of any shape; their dtypes are float64 to float16, bfloat16, bool, uint8, or
    signed integers. The bytes are those of safetensors' own `save_file`. That function takes 80 µs for each tensor, 17
    s for this model's tensors, and creates a file that only its owner may read, so that a server of another user cannot
    open it. Here the umask decides who may read the file.
    """
    order = {dtype: position for position, dtype in enumerate(_NAMES)}
    names = sorted(tensors, key=lambda name: (order[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        fields = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = fields
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    scratch = file.with_name(f".{file.name}.part")
    scratch.unlink(missing_ok=True)
    with scratch.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            stream.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    scratch.replace(file)
