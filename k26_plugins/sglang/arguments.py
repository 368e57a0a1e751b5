"""Fills in SGLang's arguments for this model before SGLang settles them. A flag that the user gave wins."""

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
# The names of the core's backends that run on a GPU.
ON_GPU = ("triton", "reference")


def before_settling(original: Callable[[Any], Any], server_args: Any) -> Any:
    """Wrap the method by which SGLang settles its arguments, so that this model's are filled in before.

    Raises ValueError for a hybrid run with --enable-two-batch-overlap.
    """
    compat.keep_given_runner(server_args)
    if is_this_model(_readable_name(server_args), server_args.revision):
        if getattr(server_args, "kt_weight_path", None) is not None:
            refuse_two_batches(server_args)
        _choose_parsers(server_args)
        _choose_runner(server_args)
        _leave_prompts_out_of_graphs(server_args)
    return original(server_args)


def _readable_name(server_args: Any) -> str:
    """Return a name or a folder from which transformers can read the model's configuration.

    The configuration of a model in an object store or on ModelScope is fetched here, from the source and into the
    folder that SGLang uses later.
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
    """Choose a MoE runner with which SGLang computes the routing itself, if the core's experts are to run on a GPU.

    Otherwise SGLang would choose flashinfer_trtllm for this checkpoint on Blackwell, whose kernel computes the routing.
    """
    hybrid = getattr(server_args, "kt_weight_path", None) is not None
    by_the_core = hybrid or EXPERTS.read() in ON_GPU
    if by_the_core and server_args.moe_runner_backend == "auto" and compat.on_gpu(server_args):
        server_args.moe_runner_backend = "triton"


def refuse_two_batches(server_args: Any) -> None:
    """Raise ValueError if a hybrid run is to overlap the two halves of a batch (--enable-two-batch-overlap).

    This is called before SGLang checks the flag, because SGLang's message would advise DP attention where there is no
    all-to-all. With DP attention the first batch would end the server: with the overlap, SGLang's layers of this model
    hand tokens to experts by an all-to-all only.
    """
    if getattr(server_args, "enable_two_batch_overlap", False):
        raise ValueError(
            "--enable-two-batch-overlap needs expert parallelism (--moe-a2a-backend) for this model, and a hybrid run "
            "places experts itself: leave it out."
        )


def _leave_prompts_out_of_graphs(server_args: Any) -> None:
    """Have a hybrid run on a GPU compute prefills without CUDA graphs.

    In a graph all of the CPU's experts would be computed on the CPU, also for long prompts. A flag of SGLang's for
    prefill alone, such as --cuda-graph-backend-prefill, takes precedence over the one that is set here.
    """
    if getattr(server_args, "kt_weight_path", None) is None or not compat.on_gpu(server_args):
        return
    for name in ("disable_prefill_cuda_graph", "disable_piecewise_cuda_graph"):
        if hasattr(server_args, name):
            setattr(server_args, name, True)
