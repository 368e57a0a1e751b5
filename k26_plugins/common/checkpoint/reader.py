"""Read a checkpoint through memory mapping: the bytes of a tensor come from the file when they are touched."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from k26_plugins.common.checkpoint.dtypes import TORCH_DTYPES
from k26_plugins.common.checkpoint.fault import compare
from k26_plugins.common.checkpoint.header import CheckpointError, weight_files
from k26_plugins.common.checkpoint.table import TensorSpec, tensor_table
from k26_plugins.common.model.config import K26Config

_SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Checkpoint:
    """The tensors of a checkpoint's folder, by name.

    Examples:
        `tiny_folder` is a checkpoint's folder, here one that `make_tiny` wrote.

        >>> checkpoint = Checkpoint(tiny_folder)
        >>> head = checkpoint.tensor("language_model.lm_head.weight")
        >>> head.shape, head.dtype
        (torch.Size([512, 128]), torch.bfloat16)
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the configuration. Raises ConfigError."""
        self.folder = Path(folder)
        self.config = K26Config.from_path(self.folder)
        self.table: dict[str, TensorSpec] = tensor_table(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor `name` in the table's shape and dtype.

        The result is a view of the mapped file unless the dtype had to be converted. Raises CheckpointError if the
        tensor is missing or differs from the table, or if a file cannot be read.
        """
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{name} is missing from {self.folder}. Run `k26 check` for the whole list.")
        tensor: torch.Tensor = file.get_tensor(name)
        dtype = _SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype))
        problem = compare(name, tensor.shape, dtype, self.table.get(name))
        if problem:
            raise CheckpointError(f"{name} {problem.message}")
        return tensor.to(TORCH_DTYPES[self.table[name].dtype])

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The open file of every tensor, by the tensor's name."""
        opened: dict[str, Any] = {}
        for path in weight_files(self.folder):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path.name} cannot be read ({error}). Download it again.") from error
            opened.update(dict.fromkeys(file.keys(), file))
        return opened
