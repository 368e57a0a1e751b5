"""What every adapter makes of its engine's configuration object."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k26_plugins.common.checkpoint import Classification, Layout, classify
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.settings import PARSERS


def core_answer(hf_config: Any, folder: Path | None, warn: Callable[[str], None]) -> Classification | None:
    """What a checkpoint is that the core serves, in the published layout or saved from it; None for another layout, which
    is the engine's.

    `warn` is told once why. folder: whose headers are checked; None where the weights are not here. Raises ConfigError or
    CheckpointError for a checkpoint that is damaged, contradicts itself or is of another model.
    """
    answer = classify(hf_config.to_dict(), folder)
    if answer.layout is not Layout.OTHER:
        return answer
    warn(
        f"k26-plugins: this checkpoint is not in Kimi-K2.6's published layout, the engine's own code serves it: "
        f"{answer.reason}."
    )
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


def say_parsers(logger: logging.Logger, reasoning: str | None, tool_calls: str | None) -> None:
    """Log which parsers of answers a server has, where some of them were chosen for it."""
    logger.info(
        "k26-plugins: reasoning parser %s, tool-call parser %s (flags win; %s=none leaves them out).",
        reasoning,
        tool_calls,
        PARSERS.variable,
    )
