"""The vLLM adapter. vLLM calls `register` in every process, through the entry point `vllm.general_plugins`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from k26_plugins.common.adapters.activation import activate

if TYPE_CHECKING:
    from k26_plugins.common.adapters.registration import Registration

# The logger is a child of vLLM's own, so that vLLM's level and format apply.
logger = logging.getLogger("vllm.k26_plugins")


def register() -> None:
    """Put Kimi-K2.6's classes into vLLM's registries. The call is cheap, and a second one does no harm.

    A failure is logged and not raised, because vLLM does not catch what a plugin raises. `VLLM_PLUGINS` without `k26`
    in it switches the plugin off.
    """
    activate("vLLM", logger, _note)


def _note(changes: Registration) -> None:
    from k26_plugins.vllm import compat

    compat.register_model(changes, "k26_plugins.vllm.entry")
    compat.register_tokenizer(
        changes, ("k26_plugins.vllm.tokenizer", "K26Tokenizer"), ("k26_plugins.vllm.renderer", "K26Renderer")
    )
    compat.register_parsers(changes, "k26_plugins.vllm.output", "K26ToolParser", "K26ReasoningParser")
    compat.register_composition(changes)
    compat.register_grammars(changes, "k26_plugins.vllm.grammars", "grammar_tokenizer")
    compat.register_tokenizer_choice(changes, "k26_plugins.vllm.config", "choose_tokenizer")
    compat.register_argument_hook(changes)
    compat.register_config_hook(changes, "k26_plugins.vllm.config")
