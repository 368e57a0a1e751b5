"""Refuses LoRA adapters with parts that SGLang would silently leave out, and names the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_CORE_EXPERTS = "the core's experts multiply INT4 weights alone: train without the routed experts, or `k26 merge`"
_VISION = "SGLang puts adapters on the language model's layers alone: train without the vision tower, or `k26 merge`"


def refuse_unserved(original: Callable[..., None], adapter: Any, name: str, weight: torch.Tensor) -> None:
    """Wrap SGLang's `LoRAAdapter._process_weight` so that a tensor which has no effect is refused.

    Raises ValueError, with which SGLang answers the request to load the adapter. Otherwise such a tensor would silently
    be left out: the core's experts take no adapters, and SGLang puts none on the vision tower.
    """
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
