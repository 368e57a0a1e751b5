"""What `vllm serve` does for this model before it is up: chats as the model knows them, and the parsers of its
output where its user said nothing."""

from __future__ import annotations

from typing import Any

from k26_plugins.common.adapters.serving import say_parsers
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.common.settings import PARSERS
from k26_plugins.vllm import chats, compat, logger

# vLLM's own, where the user asks for it and in releases without the one that ours mends.
PARSER = "kimi_k2"


def before_serving(model_config: Any, engine_args: Any, flags: Any) -> None:
    """Install the hooks of chats and choose the parsers: the configuration is known, and nothing else of the API server
    is made yet."""
    if ARCHITECTURE in (model_config.hf_config.architectures or []) and hasattr(flags, "tool_call_parser"):
        chats.install()
        if PARSERS.read() != "none":
            choose_parsers(engine_args, flags)


def choose_parsers(engine_args: Any, flags: Any) -> None:
    """Fill in the parsers that the command line leaves out, in place: the server's and the engine's."""
    parser = compat.PARSER if PARSERS.read() == "auto" and compat.has_kimi_parser() else PARSER
    if not flags.tool_call_parser:
        flags.tool_call_parser = parser
        flags.enable_auto_tool_choice = True
    if not flags.reasoning_parser and not getattr(flags.structured_outputs_config, "reasoning_parser", ""):
        flags.reasoning_parser = engine_args.reasoning_parser = parser
    reasoning = flags.reasoning_parser or flags.structured_outputs_config.reasoning_parser
    say_parsers(logger, reasoning, flags.tool_call_parser)
