"""Recognize the state that an engine saved of a running model (`--load-format sharded_state`).

Its files hold the engine's own parameters, rank by rank, instead of the checkpoint's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from k26_plugins.common.checkpoint.header import CheckpointError, HeaderEntry, index_of
from k26_plugins.common.model.config import PACK_FACTOR, K26Config

# The engines' default file names, with the tensor-parallel rank, or with the pipeline stage too.
_FILE = re.compile(r"model-(rank-\d+|pp-\d+-tp-\d+)-part-\d+\.safetensors")
# The load formats whose loaders would read these files and find none of the checkpoint's tensors in them.
_OF_CHECKPOINTS = ("auto", "hf", "safetensors")
_EXPERTS = re.compile(r"(.+\.experts\b.*)\.w13_weight_packed")


def saved_state_files(folder: Path) -> list[Path]:
    """Return the files of a state that was saved to `folder`, or an empty list if a checkpoint is there too.

    A copied index does not count as a checkpoint if the folder has none of the files that it names. Raises
    CheckpointError for a damaged index.
    """
    files = sorted(file for file in folder.glob("model-*.safetensors") if _FILE.fullmatch(file.name))
    if files and any((folder / name).exists() for name in set(index_of(folder).values())):
        return []
    return files


def has_core_experts(entries: Iterable[HeaderEntry], config: K26Config) -> bool:
    """Return whether the saved routed experts are the core's, which are saved in the checkpoint's form.

    An engine's own experts are saved under the same names, but in the layout of the engine's kernels, and with their
    shapes (`weight_shape`).
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
    """Raise CheckpointError if `load_format` is a loader of checkpoints, which cannot read a saved state.

    Engines use such a loader unless the user chooses another.
    """
    if load_format in _OF_CHECKPOINTS:
        raise CheckpointError(
            "this is a state that an engine saved, not a checkpoint: give --load-format sharded_state."
        )
