"""What this model wants of SGLang's arguments, before SGLang settles them; a flag that the user gave wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.hf_tokenizer import is_this_model
from k26_plugins.common.settings import PARSERS_VARIABLE, experts_setting, parsers_by_default
from k26_plugins.sglang import compat, logger

PARSER = "kimi_k2"
# The core's experts that run on a GPU.
ON_GPU = ("triton", "reference")


def before_settling(original: Callable[[Any], Any], server_args: Any) -> Any:
    compat.keep_given_runner(server_args)
    if is_this_model(compat.fetched_folder(server_args), server_args.revision):
        _choose_parsers(server_args)
        _choose_runner(server_args)
    return original(server_args)


def _choose_parsers(server_args: Any) -> None:
    """Those that the command line leaves out."""
    missing = [name for name in ("reasoning_parser", "tool_call_parser") if getattr(server_args, name) is None]
    if missing and parsers_by_default():
        for name in missing:
            setattr(server_args, name, PARSER)
        logger.info(
            "k26-plugins: reasoning parser %s, tool-call parser %s (flags win; %s=none leaves them out).",
            server_args.reasoning_parser,
            server_args.tool_call_parser,
            PARSERS_VARIABLE,
        )


def _choose_runner(server_args: Any) -> None:
    """Where the core's experts are asked for on a GPU: a runner under which SGLang routes before the experts.

    Left alone, SGLang takes flashinfer_trtllm on Blackwell for this checkpoint, whose kernel routes by itself.
    """
    hybrid = getattr(server_args, "kt_weight_path", None) is not None
    by_the_core = hybrid or experts_setting() in ON_GPU
    if by_the_core and server_args.moe_runner_backend == "auto" and compat.on_gpu(server_args):
        server_args.moe_runner_backend = "triton"
