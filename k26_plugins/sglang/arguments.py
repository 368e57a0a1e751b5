"""What this model wants of SGLang's arguments, before SGLang settles them; a flag that the user gave wins."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k26_plugins.common.adapters.serving import say_parsers
from k26_plugins.common.prompt.hf_tokenizer import is_this_model
from k26_plugins.common.settings import EXPERTS, PARSERS
from k26_plugins.sglang import compat, compat_loading, logger

PARSER = "kimi_k2"
MODELSCOPE_VARIABLE = "SGLANG_USE_MODELSCOPE"
# The core's experts that run on a GPU.
ON_GPU = ("triton", "reference")


def before_settling(original: Callable[[Any], Any], server_args: Any) -> Any:
    compat.keep_given_runner(server_args)
    if is_this_model(_readable_name(server_args), server_args.revision):
        if getattr(server_args, "kt_weight_path", None) is not None:
            refuse_two_batches(server_args)
        _choose_parsers(server_args)
        _choose_runner(server_args)
        _leave_prompts_out_of_graphs(server_args)
    return original(server_args)


def _readable_name(server_args: Any) -> str:
    """The model's name or folder as transformers can read its configuration.

    SGLang fetches what is not on the hub later, from the same places into the same folders.
    """
    name = compat_loading.object_store_folder(server_args.model_path, fetch=True)
    if os.environ.get(MODELSCOPE_VARIABLE, "").lower() not in ("true", "1") or Path(name).exists():
        return name
    modelscope = importlib.import_module("modelscope")
    cache = importlib.import_module("modelscope.utils.file_utils").get_model_cache_root()
    for root in (cache, server_args.download_dir):
        if root and (Path(root) / name / "config.json").exists():
            return str(Path(root) / name)
    file = modelscope.model_file_download(model_id=name, file_path="config.json", revision=server_args.revision)
    return str(Path(file).parent)


def _choose_parsers(server_args: Any) -> None:
    """Choose the parsers that the command line leaves out."""
    missing = [name for name in ("reasoning_parser", "tool_call_parser") if getattr(server_args, name) is None]
    if missing and PARSERS.read() != "none":
        for name in missing:
            setattr(server_args, name, PARSER)
        say_parsers(logger, server_args.reasoning_parser, server_args.tool_call_parser)


def _choose_runner(server_args: Any) -> None:
    """Choose a runner under which SGLang routes before the experts, where the core's experts are asked for on a GPU.

    Left alone, SGLang takes flashinfer_trtllm on Blackwell for this checkpoint, whose kernel routes by itself.
    """
    hybrid = getattr(server_args, "kt_weight_path", None) is not None
    by_the_core = hybrid or EXPERTS.read() in ON_GPU
    if by_the_core and server_args.moe_runner_backend == "auto" and compat.on_gpu(server_args):
        server_args.moe_runner_backend = "triton"


def refuse_two_batches(server_args: Any) -> None:
    """Raises ValueError where a hybrid run is to compute two halves of a batch beside each other.

    Before SGLang checks the flag: what it asks for without an all-to-all is DP attention, and with that the first batch
    would end the server, as its operations of this model's layers hand tokens to experts by the all-to-all alone.
    """
    if getattr(server_args, "enable_two_batch_overlap", False):
        raise ValueError(
            "--enable-two-batch-overlap needs expert parallelism (--moe-a2a-backend) for this model, and a hybrid run "
            "places experts itself: leave it out."
        )


def _leave_prompts_out_of_graphs(server_args: Any) -> None:
    """Have a hybrid run compute prompts without graphs, which would leave all of the CPU's experts there for long ones.

    SGLang takes its own flags for one phase of the two over this one.
    """
    if getattr(server_args, "kt_weight_path", None) is None or not compat.on_gpu(server_args):
        return
    for name in ("disable_prefill_cuda_graph", "disable_piecewise_cuda_graph"):
        if hasattr(server_args, name):
            setattr(server_args, name, True)
