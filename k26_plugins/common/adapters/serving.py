"""Applies the core's configuration to an engine's configuration object, in the same way for every adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k26_plugins.common.checkpoint import Classification, Layout, classify
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.settings import PARSERS


def core_answer(hf_config: Any, folder: Path | None, warn: Callable[[str], None]) -> Classification | None:
    """Return what the core knows of a checkpoint that it serves, or None for one that is left to the engine.

    The core serves a checkpoint in the published layout, or a state that was saved from one. For another layout `warn`
    is called once with the reason. hf_config: the engine's configuration object. folder: the folder whose headers are
    checked, None if the weights are not on this machine. Raises ConfigError or CheckpointError for a checkpoint that is
    damaged, contradicts itself or is of another model.
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
    """Write the core's sizes into an engine's vision configuration, under every name that an engine reads.

    The hub's config.json spells the sizes `vt_*` and `init_pos_emb_*`. A configuration class that knows only its own
    names silently fills those with the published model's sizes.
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
    """Log which reasoning parser and tool-call parser a server uses, some of which the plugin chose."""
    logger.info(
        "k26-plugins: reasoning parser %s, tool-call parser %s (flags win; %s=none leaves them out).",
        reasoning,
        tool_calls,
        PARSERS.variable,
    )
