"""Prepares `vllm serve` for this model before the server is up: installs the hooks around vLLM's handling of chats, and
chooses the parsers of answers that the command line leaves out."""

from __future__ import annotations

from typing import Any

from k26_plugins.common.adapters.serving import say_parsers
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.common.settings import PARSERS
from k26_plugins.vllm import chats, compat, logger

# The name of vLLM's own parser. It serves where the user asks for it, and in releases that do not have the parser which
# the plugin's corrects.
PARSER = "kimi_k2"


def before_serving(model_config: Any, engine_args: Any, flags: Any) -> None:
    """Install the hooks around chats and choose the parsers, if the model is Kimi-K2.6.

    This is called when the model's configuration is known and nothing else of the API server exists yet. engine_args:
    vLLM's `AsyncEngineArgs`. flags: the parsed command line.
    """
    if ARCHITECTURE in (model_config.hf_config.architectures or []) and hasattr(flags, "tool_call_parser"):
        chats.install()
        if PARSERS.read() != "none":
            choose_parsers(engine_args, flags)


def choose_parsers(engine_args: Any, flags: Any) -> None:
    """Write the parsers that the command line leaves out into the server's flags and the engine's arguments."""
    parser = compat.PARSER if PARSERS.read() == "auto" and compat.has_kimi_parser() else PARSER
    if not flags.tool_call_parser:
        flags.tool_call_parser = parser
        flags.enable_auto_tool_choice = True
    if not flags.reasoning_parser and not getattr(flags.structured_outputs_config, "reasoning_parser", ""):
        flags.reasoning_parser = engine_args.reasoning_parser = parser
    reasoning = flags.reasoning_parser or flags.structured_outputs_config.reasoning_parser
    say_parsers(logger, reasoning, flags.tool_call_parser)
