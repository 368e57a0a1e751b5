"""Holds the model class that SGLang's registry finds: the plugin's, or none if this release lacks a name that the
plugin's class is made from."""

from __future__ import annotations

from k26_plugins.common.adapters.engine import UnsupportedEngineError
from k26_plugins.common.adapters.hooks import go_without
from k26_plugins.sglang import logger

EntryClass: list[type]
try:
    from k26_plugins.sglang.model import KimiK25ForConditionalGeneration

    EntryClass = [KimiK25ForConditionalGeneration]
except (ImportError, AttributeError, UnsupportedEngineError) as error:
    go_without(error, "SGLang's own model class serves, with its own experts and media", logger)
    EntryClass = []
