"""One of three answers for a checkpoint: the published layout, this architecture in another layout, or an error.

The answer comes from what the files' headers say, and the configuration is held against it. What differs from the
published table in the same way wherever it occurs is another layout, which an engine may serve by its own code. What
differs here and there is damage, and so is a configuration that says something else than the weights.
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

# Where quantizers say it that leave config.json as it was: ModelOpt, AutoAWQ, AutoGPTQ.
_QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")


class Layout(StrEnum):
    """Who serves a checkpoint, by how its tensors are stored."""

    PUBLISHED = "published"
    """The layout that moonshotai publishes, in any sizes: the core serves it."""
    OTHER = "other"
    """This architecture, stored or built otherwise: the engine's own code serves it."""
    SAVED = "saved"
    """What an engine saved while the core's experts were in it: the core serves it, and the engine's loader of such states
    loads it."""


@dataclass(frozen=True, slots=True)
class Classification:
    """The layout of a checkpoint, and why it is that one."""

    layout: Layout
    config: K26Config
    """The checkpoint's sizes; with the published layout, all that the core needs."""
    reasons: tuple[str, ...] = ()
    """What is not as published. Empty for the published layout."""

    @property
    def reason(self) -> str:
        """The first of the reasons, and how many more there are."""
        more = f" (and {len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
        return f"{self.reasons[0]}{more}" if self.reasons else ""


def classify_folder(
    folder: str | Path, on_file: Callable[[int, int], None] = lambda done, total: None
) -> Classification:
    """The answer for a checkpoint's folder, by its own config.json. Raises ConfigError or CheckpointError, the third."""
    folder = Path(folder)
    return classify(read_config_json(folder), folder, on_file)


def classify(
    config: Mapping[str, Any],
    folder: Path | None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Classification:
    """The answer for a configuration, as a file or an engine has it, and the weights in `folder`.

    folder: None, or one without weights, where they are not here yet (a name on the hub, dummy weights): then the
    configuration decides, and what arrives is checked while it is loaded. `on_file(done, total)` is called after each
    file. Raises ConfigError for another model or impossible sizes, CheckpointError for weights that are damaged or
    contradict the configuration.
    """
    examined = examine_all(config, folder, on_file)
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
    """All that the answer is made of."""

    sizes: K26Config
    other: list[str]
    """What is not as published."""
    problems: list[Problem]
    inventory: Inventory | None
    """None where there are no weights to look at."""
    table: dict[str, TensorSpec]
    """The table of tensors for these sizes; empty where no tensor was held against it."""
    saved_by_core: bool = False
    """Whether nothing else is not as published than that an engine saved it, with the core's experts."""


def examine_all(
    config: Mapping[str, Any],
    folder: Path | None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Do what `classify` does and list the faults. Raises ConfigError, and CheckpointError for a damaged index."""
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
