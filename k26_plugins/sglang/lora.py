"""LoRA adapters in SGLang: a part that would be left out without a word is refused, by its module's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_CORE_EXPERTS = "the core's experts multiply INT4 weights alone: train without the routed experts, or `k26 merge`"
_VISION = "SGLang puts adapters on the language model's layers alone: train without the vision tower, or `k26 merge`"


def refuse_unserved(original: Callable[..., None], adapter: Any, name: str, weight: torch.Tensor) -> None:
    """Around what sorts the tensors of an adapter's file into layers. Raises ValueError, which SGLang answers the request
    with that would load the adapter."""
    reason = _unserved(f".{name}")
    if reason:
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        raise ValueError(f"the adapter is for {module} among others: {reason}.")
    original(adapter, name, weight)


def _unserved(name: str) -> str | None:
    if ".mlp.experts." in name:
        return _CORE_EXPERTS
    if ".vision_tower." in name or ".mm_projector." in name:
        return _VISION
    return None
