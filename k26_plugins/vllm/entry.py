"""Holds the model class that vLLM's registry loads: the plugin's, or vLLM's own if this release lacks a name that the
plugin's class is made from."""

from __future__ import annotations

from k26_plugins.common.adapters.engine import UnsupportedEngineError
from k26_plugins.common.adapters.hooks import go_without
from k26_plugins.vllm import compat, logger

try:
    from k26_plugins.vllm.model import KimiK25ForConditionalGeneration
except (ImportError, AttributeError, UnsupportedEngineError) as error:
    go_without(error, "vLLM's own model class serves, with its own experts and media", logger)
    KimiK25ForConditionalGeneration = compat.in_tree_model().KimiK25ForConditionalGeneration  # type: ignore[misc]

__all__ = ["KimiK25ForConditionalGeneration"]
