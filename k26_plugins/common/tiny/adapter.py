"""Make LoRA adapters with random values for a checkpoint, in PEFT's format, to try an engine with.

A LoRA adapter changes a linear layer's weight to W + ALPHA / RANK · B · A (Hu et al., "LoRA: Low-Rank Adaptation of
Large Language Models").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from k26_plugins.common.checkpoint.adapter_names import BEGINNINGS
from k26_plugins.common.checkpoint.reader import Checkpoint
from k26_plugins.common.checkpoint.tensor_file import save_tensors
from k26_plugins.common.model.int4 import dequantize
from k26_plugins.common.tiny.checkpoint import make_new

RANK, ALPHA = 4, 8
# The linear layers for which both engines accept adapters. kv_b_proj is not among them, because MLA multiplies it into
# its neighbours.
_SERVED = (
    *(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")),
    *(f"mlp.{where}{name}_proj" for where in ("", "shared_experts.") for name in ("gate", "up", "down")),
)


def make_adapters(checkpoint: str | Path, folder: str | Path, *, seed: int = 0) -> list[Path]:
    """Write an adapter for each way to name modules (BEGINNINGS) into `folder`, which is created.

    Each adapter is for all layers that may have one. Returns the adapters' folders. Raises FileExistsError if `folder`
    already contains something.
    """
    source, folder = Checkpoint(Path(checkpoint)), Path(folder)
    make_new(folder)
    drawn = (Adapter.draw(source, served_modules(source), seed + place) for place in range(len(BEGINNINGS)))
    written = zip(drawn, BEGINNINGS.items(), strict=True)
    return [adapter.write(folder / name, beginning) for adapter, (name, beginning) in written]


def served_modules(checkpoint: Checkpoint) -> list[str]:
    """Return the linear layers that may have an adapter in every engine, by their names in the checkpoint."""
    weights = (name.removesuffix(".weight") for name in checkpoint.table if name.endswith(".weight"))
    return [name for name in weights if name.split(".", 4)[-1] in _SERVED and ".layers." in name]


def dense_weight(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    """Return the weight of a linear layer, INT4 or not, as float32 `[out_features, in_features]`."""
    if f"{module}.weight" in checkpoint.table:
        return checkpoint.tensor(f"{module}.weight").float()
    packed, scale = (checkpoint.tensor(f"{module}.weight_{part}") for part in ("packed", "scale"))
    return dequantize(packed, scale, torch.float32)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    `weights` holds the pair `lora_A` `[rank, in_features]` and `lora_B` `[out_features, rank]` by a module's name in
    the checkpoint.
    """

    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def draw(cls, checkpoint: Checkpoint, modules: Sequence[str], seed: int) -> Adapter:
        """Draw an adapter for the modules.

        Its change of a weight has about a third of the weight's standard deviation.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for module in modules:
            weight = dense_weight(checkpoint, module)
            out_features, in_features = weight.shape
            size = (weight.std().item() / 3 * RANK / ALPHA / RANK**0.5) ** 0.5
            weights[module] = (
                torch.randn(RANK, in_features, generator=generator) * size,
                torch.randn(out_features, RANK, generator=generator) * size,
            )
        return cls(weights)

    def write(self, folder: Path, beginning: str) -> Path:
        """Write the adapter into `folder`, which is created, and return the folder.

        beginning: the prefix of the language model in the trainer's class, one of the values of BEGINNINGS.
        """
        folder.mkdir(parents=True)
        tensors = {}
        for module, (a, b) in self.weights.items():
            name = f"base_model.model.{module.replace(BEGINNINGS['hub'], beginning, 1)}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": ALPHA,
            "bias": "none",
            "target_modules": sorted({module.rsplit(".", 1)[1] for module in self.weights}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return folder
