"""Merge a LoRA adapter into a checkpoint, so that every engine can serve the result with every backend of experts.

After Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", the weight W of a linear layer becomes W + s · B
· A. The adapter is a folder in the format of the PEFT library.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.checkpoint.adapter_names import SPELLINGS
from k26_plugins.common.checkpoint.header import HeaderEntry, read_header, weight_files
from k26_plugins.common.model.int4 import GROUP_SIZE, dequantize, quantize

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
COPY_BYTES = 16 * 2**20


class MergeError(ValueError):
    """The error for an adapter or folder that cannot be merged. The message names it and the remedy."""


@dataclass(frozen=True)
class LowRank:
    """The change that an adapter makes to the weight of one linear layer: scale · B · A."""

    a: torch.Tensor
    """`[rank, in_features]`."""
    b: torch.Tensor
    """`[out_features, rank]`."""
    scale: float

    def change(self) -> torch.Tensor:
        """Return the difference that is added to the weight, float32 `[out_features, in_features]`."""
        return self.scale * (self.b.float() @ self.a.float())


@dataclass
class Merged:
    """The report of a merge: how many matrices changed, and how much of the change INT4 lost."""

    num_modules: int = 0
    """Linear layers that the adapter changes."""
    num_int4: int = 0
    """INT4 matrices that were quantized again."""
    _changed: float = field(default=0.0, repr=False)
    _lost: float = field(default=0.0, repr=False)

    def add_int4(self, change: torch.Tensor, lost: torch.Tensor) -> None:
        """Count one INT4 matrix. change: what the adapter adds to it. lost: the error of quantizing the sum again."""
        self.num_int4 += 1
        self._changed += change.square().sum().item()
        self._lost += lost.square().sum().item()

    @property
    def share_lost(self) -> float:
        """The error of quantizing INT4 matrices again, divided by the adapter's change of them: a ratio of norms."""
        return math.sqrt(self._lost / self._changed) if self._changed else 0.0


def read_adapter(folder: Path, checkpoint: Checkpoint) -> dict[str, LowRank]:
    """Read the adapter in `folder` and return its changes by the module's name in the checkpoint.

    Raises MergeError if the adapter cannot be read, is of another kind than LoRA, or does not fit the checkpoint.
    """
    settings = _settings(folder / CONFIG_FILE)
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                module, _, part = name.removeprefix(PREFIX).partition(".lora_")
                if part not in ("A.weight", "B.weight"):
                    raise MergeError(
                        f"{folder} changes {name}, which is no A or B of a linear layer: train without bias, DoRA, "
                        f"embeddings and modules_to_save."
                    )
                found.setdefault(module, {})[part[0]] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise MergeError(f"{folder / WEIGHTS_FILE} cannot be read ({error}): give a folder that PEFT wrote.") from error
    return dict(_change(folder, module, parts, settings, checkpoint) for module, parts in found.items())


def _settings(file: Path) -> Mapping[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
        float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(
            f"{file} is no configuration of a LoRA adapter ({error}): give a folder that PEFT wrote."
        ) from error
    if kind != "LORA" or settings.get("use_dora") or settings.get("fan_in_fan_out"):
        raise MergeError(f"{file} is of another kind of adapter than LoRA of linear layers: it cannot be merged here.")
    return settings


def _change(
    folder: Path, module: str, parts: Mapping[str, torch.Tensor], settings: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[str, LowRank]:
    if parts.keys() != {"A", "B"}:
        raise MergeError(f"{folder} has half of the change of {module}: it was not written to its end.")
    a, b = parts["A"], parts["B"]
    name = module
    for spelling, ours in SPELLINGS.items():
        if module.startswith(spelling):
            name = module.replace(spelling, ours, 1)
            break
    table = checkpoint.table
    expert = table.get(f"{name}.weight_packed")
    dense = table.get(f"{name}.weight")
    if expert is not None:
        shape = (expert.shape[0], table[f"{name}.weight_scale"].shape[1] * GROUP_SIZE)
    elif dense is not None and len(dense.shape) == 2:
        shape = (dense.shape[0], dense.shape[1])
    else:
        raise MergeError(f"{folder} changes {module}, and {checkpoint.folder} has no such linear layer.")
    if (b.shape[0], a.shape[-1]) != shape or a.shape[0] != b.shape[-1]:
        raise MergeError(
            f"{folder} changes {module} by {tuple(b.shape)} · {tuple(a.shape)}, and the layer is {shape}: it was trained "
            f"for another model."
        )
    alpha = _of_pattern(settings.get("alpha_pattern"), module, float(settings["lora_alpha"]))
    rank = a.shape[0]
    return name, LowRank(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _of_pattern(patterns: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    """Return the value of the first pattern that matches the module's name at its end, as in PEFT, or `otherwise`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return otherwise


def merge(
    folder: Path, adapter: Path, out: Path, on_bytes: Callable[[int, int], object] = lambda count, size: None
) -> Merged:
    """Write the checkpoint in `folder` with the adapter merged into it to `out`, a new or empty folder.

    Beside the adapter, about one matrix is in memory at a time. Dense matrices are summed in float32 and rounded to
    their dtype; INT4 matrices are quantized as the published checkpoint is, symmetrically in groups of 32. Every other
    byte is copied. on_bytes: called with the number of bytes of each piece that was copied and with the total number of
    bytes to copy. Raises MergeError, CheckpointError, ConfigError, OSError.
    """
    checkpoint = Checkpoint(folder)
    changes = read_adapter(adapter, checkpoint)
    if out.exists() and any(out.iterdir()):
        raise MergeError(f"{out} is not empty: give a new folder.")
    files = weight_files(folder)
    out.mkdir(parents=True, exist_ok=True)
    size, free = sum(file.stat().st_size for file in files), shutil.disk_usage(out).free
    if size > free:
        raise MergeError(
            f"{out} has {free / 1e9:.1f} GB free and the checkpoint is {size / 1e9:.1f} GB: make room first."
        )
    names = {file.name for file in files}
    for file in folder.iterdir():
        if file.is_file() and file.name not in names:
            shutil.copy(file, out / file.name)
    job = _Job(checkpoint, changes)
    for file in files:
        scratch = out / f".{file.name}.part"
        _copy(file, scratch, lambda count: on_bytes(count, size))
        with scratch.open("r+b") as stream:
            for entry in read_header(file):
                if (tensor := job.merged(entry)) is not None:
                    stream.seek(entry.start)
                    stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
        scratch.replace(out / file.name)
    return job.report


class _Job:
    def __init__(self, checkpoint: Checkpoint, changes: Mapping[str, LowRank]) -> None:
        self._checkpoint, self._changes = checkpoint, changes
        # The packed weights and scales of each matrix that was quantized again, until both have been written: the
        # file's header may list them apart.
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self.report = Merged(num_modules=len(changes))

    def merged(self, entry: HeaderEntry) -> torch.Tensor | None:
        """Return the tensor that replaces the one of this header entry, or None if the tensor stays as it is."""
        module, _, part = entry.name.rpartition(".")
        change = self._changes.get(module)
        if change is None:
            return None
        if part == "weight":
            weight = self._checkpoint.tensor(entry.name)
            return (weight.float() + change.change()).to(weight.dtype)
        if part not in ("weight_packed", "weight_scale"):
            return None
        if module not in self._pending:
            self._pending[module] = self._quantized(module, change.change())
        parts = self._pending[module]
        tensor = parts.pop(part)
        if not parts:
            del self._pending[module]
        return tensor

    def _quantized(self, module: str, change: torch.Tensor) -> dict[str, torch.Tensor]:
        stored = {part: self._checkpoint.tensor(f"{module}.{part}") for part in ("weight_packed", "weight_scale")}
        exact = dequantize(stored["weight_packed"], stored["weight_scale"], torch.float32) + change
        packed, scale = quantize(exact)
        self.report.add_int4(change, dequantize(packed, scale, torch.float32) - exact)
        return {"weight_packed": packed, "weight_scale": scale}


def _copy(source: Path, target: Path, on_bytes: Callable[[int], object]) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(COPY_BYTES):
            writing.write(piece)
            on_bytes(len(piece))
