"""Writing safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a file that is there whole or not at all, whenever the process is killed, readable by whom the umask lets.

    safetensors makes a file that its owner alone may read, which a server of another user cannot open.
    """
    scratch = file.with_name(f".{file.name}.part")
    scratch.unlink(missing_ok=True)
    scratch.touch()
    mode = scratch.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)
    scratch.chmod(mode)
    scratch.replace(file)
