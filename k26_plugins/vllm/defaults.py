"""What `vllm serve` does for this model where its user said nothing: the parsers of its output."""

from __future__ import annotations

from typing import Any

from k26_plugins.common.config import ARCHITECTURE
from k26_plugins.common.settings import PARSERS_VARIABLE, parsers_by_default
from k26_plugins.vllm import compat, logger

# vLLM's own, in releases without the one that ours mends.
PARSER = "kimi_k2"


def choose_parsers(model_config: Any, engine_args: Any, flags: Any) -> None:
    """Fill in the parsers that the command line leaves out, in place: the server's and the engine's."""
    is_this_model = ARCHITECTURE in (model_config.hf_config.architectures or [])
    if not (is_this_model and hasattr(flags, "tool_call_parser") and parsers_by_default()):
        return
    parser = compat.PARSER if compat.has_kimi_parser() else PARSER
    if not flags.tool_call_parser:
        flags.tool_call_parser = parser
        flags.enable_auto_tool_choice = True
    if not flags.reasoning_parser and not getattr(flags.structured_outputs_config, "reasoning_parser", ""):
        flags.reasoning_parser = engine_args.reasoning_parser = parser
    logger.info(
        "k26-plugins: reasoning parser %s, tool-call parser %s (flags win; %s=none leaves them out).",
        flags.reasoning_parser or flags.structured_outputs_config.reasoning_parser,
        flags.tool_call_parser,
        PARSERS_VARIABLE,
    )
