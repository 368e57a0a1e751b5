"""What every adapter makes of its engine's configuration object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.config import K26Config, UnsupportedQuantizationError


def published_int4(hf_config: Any, warn: Callable[[str], None]) -> K26Config | None:
    """The core's configuration of an engine's, or None for a checkpoint whose experts are not the published INT4.

    Such a one (NVFP4, bf16) is the engine's to serve, and `warn` says so. Raises ConfigError for anything else that is
    not this model.
    """
    try:
        return K26Config.from_dict(hf_config.to_dict())
    except UnsupportedQuantizationError as error:
        warn(f"Kimi-K2.6 without the published INT4 experts keeps the engine's own experts and loader: {error}")
        return None


def write_vision(config: K26Config, hf_vision_config: Any) -> None:
    """Give an engine's vision configuration the core's sizes under every name that an engine reads.

    The hub's file spells them `vt_*` and `init_pos_emb_*`; classes that know only their own names fill those with the
    published model's sizes, silently.
    """
    vision = config.vision
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        setattr(hf_vision_config, name, getattr(vision, name))
        setattr(hf_vision_config, f"vt_{name}", getattr(vision, name))
    hf_vision_config.patch_size = vision.patch_size
    for name in ("height", "width", "time"):
        size = getattr(vision, f"pos_emb_{name}")
        setattr(hf_vision_config, f"pos_emb_{name}", size)
        setattr(hf_vision_config, f"init_pos_emb_{name}", size)
