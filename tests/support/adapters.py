"""Holds what the tests of LoRA adapters share: names of modules, and the reference with a merged adapter.

The reference with a merged adapter is the judge: an engine that serves the adapter must answer as this model does.
"""

from __future__ import annotations

import torch
from support.endpoint import Altered, Fault

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.adapter import ALPHA, RANK, Adapter

LAYER = "language_model.model.layers.{}"
# All linear layers of a dense layer, and those of an MoE layer without its router and its routed experts.
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
MODULES = (
    *(f"{LAYER.format(layer)}.self_attn.{name}" for layer in (0, 1) for name in ATTENTION),
    *(f"{LAYER.format(0)}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"{LAYER.format(1)}.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
KV_B = f"{LAYER.format(1)}.self_attn.kv_b_proj"


def merged(adapter: Adapter, checkpoint: Checkpoint) -> KimiK26:
    """Return the reference, in float32, of the checkpoint with the adapter merged into its weights."""

    def tensor(name: str, weight: torch.Tensor) -> torch.Tensor:
        found = adapter.weights.get(name.removesuffix(".weight"))
        return weight if found is None else weight.float() + ALPHA / RANK * found[1] @ found[0]

    return KimiK26(Altered(checkpoint, Fault(tensor=tensor)), torch.float32)  # type: ignore[arg-type]
