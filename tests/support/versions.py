"""Says what happens in engines' releases that lack a name of the adapters, and reads docs/versions.md.

The snapshots that it reads hold, for each checked release, every name that the adapters use and its parameters.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

from engine_names import GONE, SET_IN_A_METHOD, read_snapshot

ROOT = Path(__file__).parents[2]
_CHAT = "sglang.srt.entrypoints.openai"
_READ_AS_TEXT = "before 0.5.23 answers are read as text: a quoted marker counts as one"
_ROW_OF_TUNE = "the kernel's row in the table of `k26 tune` says so"
ABSENT = {
    "vllm": {
        "vllm.entrypoints.serve.tokenize.serving:": "the class has one of two names",
        "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.maybe_make_prepare_finalize": (
            "later releases do not ask the method for it"
        ),
        "vllm.model_executor.layers.fused_moe:modular_kernel.FusedMoEExpertsModular.supports_expert_map": (
            "later releases do not ask the experts for it"
        ),
        "vllm.model_executor.layers.attention.mla_attention:MLAAttention.is_amx_bmm_enabled": (
            "before 0.29 vLLM keeps that weight on every CPU"
        ),
        "vllm.model_executor.layers.fused_moe.layer:FusedMoE.": "`RoutedExperts` since 0.24; without tables before 0.22",
        "vllm.model_executor.layers.fused_moe.routed_experts:": "`FusedMoE` before 0.24",
        "vllm.model_executor.layers.fused_moe.experts.marlin_moe:": _ROW_OF_TUNE,
        "vllm.model_executor.layers.fused_moe.moe_fused_mul_sum:": _ROW_OF_TUNE,
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._encoder_only_lm_prefixes": (
            "before 0.31 vLLM reads all of the checkpoint"
        ),
        "vllm:envs.VLLM_MAX_IMAGE_PIXELS": "the core's own limit holds",
        "vllm.model_executor.model_loader.weight_utils:_get_fs_type": "0.19 has `_is_nfs_path`",
        "vllm.model_executor.model_loader.weight_utils:_is_nfs_path": "`_get_fs_type` since 0.20",
        "vllm.parser.": "before 0.25 there is no parser of this model's that ours could mend: vLLM's own parsers serve",
        "vllm.tool_parsers.tool_strict_level:": "before 0.31 a grammar has calls in it by other rules",
        "vllm.v1.attention.backends.mla.prefill": "before 0.29 prefill on a CPU is computed elsewhere: vLLM's own stays",
    },
    "sglang": {
        f"{_CHAT}.chat_encoding_adapters": _READ_AS_TEXT,
        f"{_CHAT}.serving_chat:OpenAIServingChat._encoding_output": _READ_AS_TEXT,
        f"{_CHAT}.serving_chat:OpenAIServingChat._effective_tools": _READ_AS_TEXT,
        f"{_CHAT}.serving_chat:OpenAIServingChat._tool_call_parsing_active": _READ_AS_TEXT,
        f"{_CHAT}.serving_chat:OpenAIServingChat._engine_prompt": "before 0.5.20: said in the log",
        f"{_CHAT}.serving_chat:normalize_assistant_tool_call_arguments": "before 0.5.14: said in the log",
        f"{_CHAT}.serving_chat:OpenAIServingChat.supports_native_reasoning_history": "said in the log",
        f"{_CHAT}.serving_responses:OpenAIServingResponses._": "before 0.5.20: said in the log",
        "sglang.srt.disaggregation.encoder": "before 0.5.19 a server of the encoder alone is as SGLang has it",
        "sglang.srt.function_call.kimik2_detector:KimiK2Detector.finish": "before 0.5.18 SGLang calls no such method",
        "sglang.srt.layers.moe.fused_moe_triton.layer:create_kt_config_from_server_args": "the fork has a switch",
        "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:": _ROW_OF_TUNE,
        "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe:": _ROW_OF_TUNE,
        "sglang.srt.layers.moe.utils:speculative_kt_ep_disabled_context": "the fork's alone",
        "sglang.srt.managers.mm_schedule": "the cache of images is in `mm_utils` before 0.5.18",
        "sglang.srt.managers.mm_utils:embedding_cache": "it is in `mm_schedule` since",
        "sglang.srt.multimodal.": "images are read by an older interface",
        "sglang.srt.plugins": "0.5.10 and the fork have no plugins: see `boot`",
        "sglang.srt.runtime_context": "settings are read where they were before",
        "sglang.srt.server_args:ServerArgs.resolve_once": "before 0.5.19 arguments are settled as the object is made",
        "sglang.srt.utils.common:_normalize_video_input": "the fork fetches a video as it does an image",
        "sglang.srt.models.kimi_k25:KimiK25ForConditionalGeneration.post_load_weights": (
            "ours has it in every release, for the language model's"
        ),
        "sglang.srt.layers.quantization.compressed_tensors.schemes:CompressedTensorsMoEScheme.restore_weights": (
            "an update ends as a first load does"
        ),
        "sglang.srt.utils.runai_utils": "the fork reads no object stores",
        "sglang.srt.utils.hf_transformers": "one module before 0.5.11, a package since",
    },
    "ktransformers": {
        "kt_kernel.utils.amx:_select_rawint4_backend": "before 0.6.2.post3 there is code for AMX alone, which is asked for",
    },
}
"""What happens in a release that lacks a name, by the beginning of the name."""


def wrong_entries(snapshot: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the snapshot's entries that differ from what Python finds in the installed engine, with both descriptions.

    Whether a name exists is always compared. Parameters are compared where both sides know them: Python knows a
    function's, and the snapshot those of a name that the release defines as a function.
    """
    wrong = {}
    for name, what in snapshot.items():
        if what.startswith("of ") or what == SET_IN_A_METHOD:
            continue  # A member of a value or of a class's objects may be set later, so it cannot be looked up here.
        found, said = _asked(name), _read(what)
        if (found == GONE) != (said == GONE) or ("?" not in (found, said) and found != said):
            wrong[name] = (what, found)
    return wrong


def _asked(name: str) -> str:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return GONE
    for part in path.split(".") if path else ():
        if not hasattr(found, part):
            return GONE
        found = getattr(found, part)
    function: Any = getattr(found, "__func__", found)
    function = inspect.unwrap(function)
    # A function that the plugin put in place of the engine's, in an earlier test, says nothing about the engine.
    if not isinstance(function, FunctionType) or function.__module__.startswith("k26_plugins."):
        return "?"
    return ", ".join(inspect.signature(function).parameters)


def _read(what: str) -> str:
    parameters = re.fullmatch(r"(?:classmethod |staticmethod )?(?:async )?\((.*)\)", what)
    if parameters is None:
        return GONE if what == GONE else "?"
    names = (part.strip("*=/ ") for part in parameters[1].split(", "))
    return ", ".join(name for name in names if name)


def release_rows(engine: str) -> list[tuple[str, int, int]]:
    """Return for each release its version, how many names differ from the release before it, and how many it lacks."""
    rows = []
    before: dict[str, str] = {}
    for version, found in read_snapshot(engine).items():
        changed = sum(before.get(name) != what for name, what in found.items()) if before else 0
        rows.append((version, changed, sum(what == GONE for what in found.values())))
        before = found
    return rows


def documented_rows(engine: str) -> list[tuple[str, int, int]]:
    """Return the first three columns of the engine's table in docs/versions.md, as `release_rows` returns them."""
    text = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    (part,) = (one for one in text.split("\n### ") if one.startswith(f"{engine}\n"))
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in part.splitlines() if line.startswith("| ")]
    return [(version, int(changed), int(gone)) for version, changed, gone in cells[1:]]
