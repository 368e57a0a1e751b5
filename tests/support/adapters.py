"""LoRA adapters as PEFT writes them, and the reference into whose weights one is merged, in float32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.endpoint import Altered, Fault

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.int4 import dequantise
from k26_plugins.common.multimodal import KimiK26

RANK, ALPHA = 4, 8
# What trainers call the language model: after the hub's class, transformers' own, and a class of the language model alone.
SPELLINGS = {"hub": "language_model.model.", "transformers": "model.language_model.", "text": "model."}
LAYER = "language_model.model.layers.{}"
# All linear layers of a dense layer, and of one with experts but those that route or are routed to.
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
MODULES = (
    *(f"{LAYER.format(layer)}.self_attn.{name}" for layer in (0, 1) for name in ATTENTION),
    *(f"{LAYER.format(0)}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"{LAYER.format(1)}.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
KV_B = f"{LAYER.format(1)}.self_attn.kv_b_proj"


def dense_weight(checkpoint: Checkpoint, module: str) -> torch.Tensor:
    """float32 `[out_features, in_features]` of a linear layer, INT4 or not."""
    if f"{module}.weight" in checkpoint.table:
        return checkpoint.tensor(f"{module}.weight").float()
    packed, scale = (checkpoint.tensor(f"{module}.weight_{part}") for part in ("packed", "scale"))
    return dequantise(packed, scale, torch.float32)


@dataclass(frozen=True)
class Adapter:
    """By the module's name in the checkpoint: `lora_A` of `[rank, in_features]` and `lora_B` of `[out_features, rank]`."""

    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def draw(cls, checkpoint: Checkpoint, modules: tuple[str, ...], seed: int) -> Adapter:
        """Each module's change is about a third of its weight."""
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
        """beginning: what a trainer's class calls the language model in the place of `language_model.model.`."""
        folder.mkdir(parents=True)
        tensors = {}
        for module, (a, b) in self.weights.items():
            name = f"base_model.model.{module.replace('language_model.model.', beginning, 1)}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": ALPHA,
            "bias": "none",
            "target_modules": sorted({module.rsplit(".", 1)[1] for module in self.weights}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def merged(self, checkpoint: Checkpoint) -> KimiK26:
        def tensor(name: str, weight: torch.Tensor) -> torch.Tensor:
            found = self.weights.get(name.removesuffix(".weight"))
            return weight if found is None else weight.float() + ALPHA / RANK * found[1] @ found[0]

        return KimiK26(Altered(checkpoint, Fault(tensor=tensor)), torch.float32)  # type: ignore[arg-type]
