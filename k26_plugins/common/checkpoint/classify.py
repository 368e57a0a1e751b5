"""Classify a checkpoint: the published layout, this architecture in another layout, or an error.

The classification rests on the headers of the files, against which the configuration is checked. If tensors differ from
the published table in the same way wherever they occur, the checkpoint has another layout, which an engine may serve by
its own code. If single tensors differ, the checkpoint is damaged; a configuration that contradicts the weights is an
error too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from k26_plugins.common.checkpoint.fault import Problem, listed
from k26_plugins.common.checkpoint.header import INDEX_FILE, CheckpointError
from k26_plugins.common.checkpoint.inventory import Inventory, take_inventory
from k26_plugins.common.checkpoint.other_layout import examine
from k26_plugins.common.checkpoint.saved_state import has_core_experts, saved_state_files
from k26_plugins.common.checkpoint.table import TensorSpec, tensor_table
from k26_plugins.common.model.config import K26Config, read_config_json

# Files in which ModelOpt, AutoAWQ and AutoGPTQ describe the quantization, if they leave config.json unchanged.
_QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")


class Layout(StrEnum):
    """How a checkpoint's tensors are stored, which decides who serves the checkpoint."""

    PUBLISHED = "published"
    """The layout that moonshotai publishes, in any sizes; the core serves it."""
    OTHER = "other"
    """This architecture, stored or built otherwise; the engine's own code serves it."""
    SAVED = "saved"
    """A state that an engine saved while it used the core's experts.

    The core serves it, and the engine's loader of such states (`--load-format sharded_state`) loads it.
    """


@dataclass(frozen=True, slots=True)
class Classification:
    """The layout of a checkpoint, with the reasons."""

    layout: Layout
    config: K26Config
    """The checkpoint's sizes. For the published layout, this is all that the core needs."""
    reasons: tuple[str, ...] = ()
    """The departures from the published layout; empty if there are none."""

    @property
    def reason(self) -> str:
        """The first of the reasons and the number of further ones, as text; empty if there are none."""
        more = f" (and {len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
        return f"{self.reasons[0]}{more}" if self.reasons else ""


def classify_folder(folder: str | Path) -> Classification:
    """Classify the checkpoint in `folder` by its own config.json.

    Raises ConfigError or CheckpointError, as `classify` does.
    """
    folder = Path(folder)
    return classify(read_config_json(folder), folder)


def classify(config: Mapping[str, Any], folder: Path | None) -> Classification:
    """Classify a checkpoint from its configuration, as a file or an engine has it, and from the weights in `folder`.

    folder: None, or a folder without weights, if the weights are not on this machine yet (a name on the hub, dummy
    weights). The configuration alone decides then, and the weights are checked while they are loaded. Raises ConfigError
    for another model or impossible sizes, and CheckpointError for weights that are damaged or contradict the
    configuration.
    """
    examined = examine_all(config, folder)
    if examined.problems:
        raise CheckpointError(
            f"the checkpoint in {folder} has {len(examined.problems)} faults:\n{listed(examined.problems)}\n"
            f"Run `k26 check {folder}` for all of them."
        )
    other = tuple(examined.other)
    layout = Layout.SAVED if examined.saved_by_core else Layout.OTHER if other else Layout.PUBLISHED
    return Classification(layout, examined.sizes, other)


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that a classification or a report is made from."""

    sizes: K26Config
    other: list[str]
    """The departures from the published layout."""
    problems: list[Problem]
    inventory: Inventory | None
    """The contents of the weight files; None if there are none."""
    table: dict[str, TensorSpec]
    """The table of tensors for these sizes; empty if no tensor was compared with it."""
    saved_by_core: bool = False
    """Whether an engine saved the weights with the core's experts in use, and the configuration is as published."""


def examine_all(
    config: Mapping[str, Any],
    folder: Path | None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Examine a checkpoint as `classify` does, but list its faults instead of raising them.

    Raises ConfigError, and CheckpointError for a damaged index.
    """
    sizes, other = K26Config.read(config)
    inventory, problems, table, saved_by_core = None, list[Problem](), dict[str, TensorSpec](), False
    if folder is not None and (saved := saved_state_files(folder)):
        inventory = take_inventory(folder, on_file, saved)
        problems = list(inventory.damage)
        saved_by_core = not other and has_core_experts(inventory.entries.values(), sizes)
        other = [*other, f"{saved[0].name} is part of a state that an engine saved"]
    elif folder is not None and (any(folder.glob("*.safetensors")) or (folder / INDEX_FILE).exists()):
        inventory = take_inventory(folder, on_file)
        problems = list(inventory.damage)
        if not problems:
            elsewhere = any((folder / name).exists() for name in _QUANTIZATION_FILES)
            table = tensor_table(sizes)
            problems, found = examine(inventory.entries, config, sizes, table, other, quantized_elsewhere=elsewhere)
            other = [*other, *found]
    elif folder is not None and (weights := sorted((*folder.glob("*.gguf"), *folder.glob("*.bin")))):
        other = [*other, f"the weights are in {weights[0].name}, not in safetensors files"]
    return Examination(sizes, other, problems, inventory, table, saved_by_core)
