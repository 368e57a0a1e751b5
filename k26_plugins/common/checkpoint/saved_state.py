"""What an engine saved of a running model, `--load-format sharded_state`: its own parameters, rank by rank."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from k26_plugins.common.checkpoint.header import CheckpointError, HeaderEntry, index_of
from k26_plugins.common.model.config import PACK_FACTOR, K26Config

# As the engines name them where the user gives no pattern: by tensor-parallel rank, or by pipeline stage too.
_FILE = re.compile(r"model-(rank-\d+|pp-\d+-tp-\d+)-part-\d+\.safetensors")
# The loaders that would read these files and find none of a checkpoint's tensors.
_OF_CHECKPOINTS = ("auto", "hf", "safetensors")
_EXPERTS = re.compile(r"(.+\.experts\b.*)\.w13_weight_packed")


def saved_state_files(folder: Path) -> list[Path]:
    """The files of a state that was saved to the folder; none where a checkpoint is there too.

    Where only a checkpoint's small files were copied along, its index is there and no file that the index names.
    """
    files = sorted(file for file in folder.glob("model-*.safetensors") if _FILE.fullmatch(file.name))
    if files and any((folder / name).exists() for name in set(index_of(folder).values())):
        return []
    return files


def has_core_experts(entries: Iterable[HeaderEntry], config: K26Config) -> bool:
    """Whether the routed experts in it are the core's, saved in the checkpoint's form.

    Those of an engine's own are under the same names as its kernels want them, and beside them are their shapes.
    """
    found = {entry.name: entry for entry in entries}
    layers = [match[1] for name in found if (match := _EXPERTS.fullmatch(name))]
    inputs, group_size = config.text.hidden_size, config.text.quantization.group_size

    def is_core(layer: str) -> bool:
        packed, scale = found[f"{layer}.w13_weight_packed"], found.get(f"{layer}.w13_weight_scale")
        return (
            f"{layer}.w13_weight_shape" not in found
            and (packed.dtype, packed.shape[-1]) == ("I32", inputs // PACK_FACTOR)
            and scale is not None
            and (scale.dtype, scale.shape[-1]) == ("BF16", inputs // group_size)
        )

    return bool(layers) and all(map(is_core, layers))


def require_its_loader(load_format: str) -> None:
    """Raises CheckpointError for an engine's loader of checkpoints, which it takes where nobody chose another."""
    if load_format in _OF_CHECKPOINTS:
        raise CheckpointError(
            "this is a state that an engine saved, not a checkpoint: give --load-format sharded_state."
        )
