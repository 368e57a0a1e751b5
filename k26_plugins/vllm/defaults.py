"""What `vllm serve` does for this model before it reads its arguments: chats as the model knows them, and the parsers of its
output where its user said nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.hf_tokenizer import is_this_model
from k26_plugins.common.settings import PARSERS_VARIABLE, parsers_by_default
from k26_plugins.vllm import chats, compat, logger

# vLLM's own, in releases without the one that ours mends.
PARSER = "kimi_k2"


def from_cli_args(original: Callable[[Any], Any], args: Any) -> Any:
    """`AsyncEngineArgs.from_cli_args`, which every process of the API server calls before it reads the rest of `args`."""
    if hasattr(args, "tool_call_parser") and is_this_model(args.model, args.revision):
        chats.install()
        if parsers_by_default():
            choose_parsers(args)
    return original(args)


def choose_parsers(args: Any) -> None:
    """Fill in the parsers that the command line leaves out, in place."""
    parser = compat.PARSER if compat.has_kimi_parser() else PARSER
    if not args.tool_call_parser:
        args.tool_call_parser = parser
        args.enable_auto_tool_choice = True
    if not args.reasoning_parser and not getattr(args.structured_outputs_config, "reasoning_parser", ""):
        args.reasoning_parser = parser
    logger.info(
        "k26-plugins: reasoning parser %s, tool-call parser %s (flags win; %s=none leaves them out).",
        args.reasoning_parser or args.structured_outputs_config.reasoning_parser,
        args.tool_call_parser,
        PARSERS_VARIABLE,
    )
