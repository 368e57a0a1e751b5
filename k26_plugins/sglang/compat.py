"""Every name of SGLang that this adapter touches and that SGLang does not promise to keep.

Checked on 0.5.10 and 0.5.23, and on KTransformers' fork 0.7.2. Where they differ the difference is detected here, by
feature and not by version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.adapters.engine import Engine, EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.common.multimodal.data_url import data_url_bytes, is_data_url, require_url

# By the distribution's name, in the order in which they are looked for.
CHECKED_VERSIONS = {"sglang": "0.5.10 to 0.5.23", "sglang-kt": "0.7.2 to 0.7.2"}
MODEL_TYPE = "kimi_k25"
MODELS_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
MEDIA_VARIABLE = "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"
_REGISTRY = "sglang.srt.models.registry"
_TRANSFORMERS = "sglang.srt.utils.hf_transformers_utils"


ENGINE = Engine(CHECKED_VERSIONS, "a newer k26-plugins; SGLANG_PLUGINS=none runs SGLang without it")
distribution = ENGINE.distribution
sglang_version = ENGINE.release


def private(module: str, name: str) -> Any:
    """An engine-private name. Raises UnsupportedEngineError where it is gone, ImportError where the engine is."""
    return ENGINE.private(EngineName(module, name, why="serve", remove_when=""))


# Each `register_…` looks up what it needs and notes what it will change; `Registration.apply` changes it.


def register_models(changes: Registration, package: str) -> None:
    """Have SGLang's registry take the model class of `package` over the in-tree one of the same name.

    Through the variable that SGLang reads when it builds the registry: importing the model here would import every model
    of SGLang before its arguments are parsed. Child processes inherit it.
    """
    chosen = os.environ.get(MODELS_VARIABLE, package)
    if MODELS_VARIABLE not in os.environ:
        changes.item(os.environ, MODELS_VARIABLE, package)
    # A module without it is being imported, and will read the variable.
    if chosen != package or hasattr(sys.modules.get(_REGISTRY), "ModelRegistry"):
        registry = private(_REGISTRY, "ModelRegistry")
        register = functools.partial(registry.register, package, overwrite=True)
        changes.entry(registry.models, ARCHITECTURE, register)


def registered_model() -> type | None:
    """The class that SGLang's registry has for this architecture, after ours was imported: the registry only logs that it
    could not be, and takes its own. Raises what the import raises."""
    importlib.import_module("k26_plugins.sglang.models.entry")
    found: type | None = private(_REGISTRY, "ModelRegistry").models.get(ARCHITECTURE)
    return found


def _config_registry() -> Any:
    common = "sglang.srt.utils.hf_transformers.common"
    return private(common if find_spec("sglang.srt.utils.hf_transformers") else _TRANSFORMERS, "_CONFIG_REGISTRY")


def registered_config() -> type | None:
    """The configuration class that SGLang has for this model type."""
    found: type | None = _config_registry().get(MODEL_TYPE)
    return found


def register_config(changes: Registration, module: str, name: str) -> None:
    """Replace the configuration class of this model type by `module.name`."""
    changes.item(_config_registry(), MODEL_TYPE, getattr(importlib.import_module(module), name))


def register_processor(changes: Registration, module: str, name: str) -> None:
    """Have SGLang build `module.name` as this model type's processor."""
    processors = private("sglang.srt.multimodal.customized_mm_processor_utils", "_CUSTOMIZED_MM_PROCESSOR")
    changes.item(processors, MODEL_TYPE, getattr(importlib.import_module(module), name))


def register_media(changes: Registration, package: str) -> None:
    """Have SGLang take the media classes of `package` over its own of the same model, as `register_models` does.

    Raises UnsupportedEngineError where the user gave SGLang another such package: it takes one.
    """
    chosen = os.environ.get(MEDIA_VARIABLE, package)
    if chosen != package:
        raise UnsupportedEngineError(
            f"{MEDIA_VARIABLE} is {chosen!r}, and SGLang takes one package: unset it to have images prepared by "
            f"k26-plugins."
        )
    changes.item(os.environ, MEDIA_VARIABLE, package)


def _tokenizer_module() -> Any:
    package = "sglang.srt.utils.hf_transformers.tokenizer"
    return importlib.import_module(package if find_spec("sglang.srt.utils.hf_transformers") else _TRANSFORMERS)


def get_tokenizer(name: str, revision: str | None) -> Any:
    """The tokenizer as SGLang loads it, through the hook of `register_tokenizer_hook`."""
    return _tokenizer_module().get_tokenizer(name, tokenizer_revision=revision)


def register_tokenizer_hook(changes: Registration, module: str, name: str) -> None:
    """Put `module.name(original, *args, **kwargs)` around SGLang's `get_tokenizer`, wherever it was imported to."""
    owner = _tokenizer_module()
    hook = getattr(importlib.import_module(module), name)
    if find_spec("sglang.srt.plugins") is not None:
        hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
        registry, target = hooks.HookRegistry, f"{owner.__name__}.get_tokenizer"
        registered = registry._hooks

        def register() -> Callable[[], None]:
            before = list(registered.get(target, ()))
            if not any(found is hook for _, found, _ in before):
                registry.register(target, hook, hooks.HookType.AROUND)
            registry.apply_hooks()
            return lambda: registered.__setitem__(target, before)

        changes.call(register)
    else:
        wrap(changes, owner, "get_tokenizer", hook)


def wrap(changes: Registration, owner: Any, name: str, hook: Callable[..., Any]) -> None:
    """What SGLang's hook registry does, for releases before it and where it would import too much: `hook(original, …)`
    around a method, or around a function in every module that imported it."""
    original = getattr(owner, name)
    if getattr(original, "k26_hook", None) is hook:
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    wrapped.k26_hook = hook  # type: ignore[attr-defined]
    if isinstance(owner, type):
        of_nobody = isinstance(vars(owner).get(name), staticmethod)
        changes.attribute(owner, name, staticmethod(wrapped) if of_nobody else wrapped)
    else:
        changes.function(owner, name, wrapped)


def register_argument_hook(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(original, server_args)` called before SGLang settles its arguments, in the launching process."""
    server_args = importlib.import_module("sglang.srt.server_args")
    if not hasattr(server_args, "ServerArgs"):
        # 0.5.10, which imports this adapter in the middle of that module: there the flags stay the user's.
        return
    method = "resolve_once" if hasattr(server_args.ServerArgs, "resolve_once") else "__post_init__"
    wrap(changes, server_args.ServerArgs, method, getattr(importlib.import_module(module), name))


def serves_chats() -> bool:
    """Whether this process is an API server: others do without the import."""
    return "sglang.srt.entrypoints.http_server" in sys.modules


def _held(source: Any) -> bytes | None:
    """The bytes that a `data:` URL holds, None for another source: SGLang's own reading takes base64 of one kind. Raises
    MediaError, for an empty address too."""
    if not isinstance(source, str):
        return None
    require_url(source)
    return data_url_bytes(source) if is_data_url(source) else None


def image_bytes(data: Any) -> bytes | None:
    """The bytes of an image as a request gives it, None where it is no file (an array, an embedding).

    Raises ValueError where they cannot be had.
    """
    source = getattr(data, "url", data)
    if not isinstance(source, str | bytes):
        return None
    if (held := _held(source)) is not None:
        return held
    get = private("sglang.srt.utils", "get_image_bytes")
    try:
        found: bytes = get(source)
    except OSError as error:
        raise ValueError(f"the image cannot be fetched: {error}") from error
    return found


def video_bytes(data: Any) -> bytes:
    """The bytes of a video as a request gives it. Raises ValueError where they cannot be had."""
    source = getattr(data, "url", data)
    if (held := _held(source)) is not None:
        return held
    # KTransformers' fork has none: there a video is fetched as an image is.
    utils = importlib.import_module("sglang.srt.utils.common")
    normalize = getattr(utils, "_normalize_video_input", utils.get_image_bytes)
    try:
        source = normalize(source)
        if source is None:
            raise ValueError(f"a video was given as {type(data).__name__}: send a URL or the file's data.")
        return source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ValueError(f"the video cannot be fetched: {error}") from error


def loaded_image(image: Any, content: Any) -> Any:
    """An image with the digest of its `content`, where this SGLang's class for the model expects one."""
    # Since 0.5.23; the cache that takes the digest is older, and knows no images of Kimi's before.
    common = "sglang.srt.multimodal.processors.kimi_common"
    loaded = getattr(importlib.import_module(common), "KimiLoadedImage", None) if find_spec(common) else None
    if loaded is None:
        return image
    return loaded(image, private("sglang.srt.multimodal.cache", "snapshot_media")(content).content_digest)


def with_fields(message: Any, fields: dict[str, str]) -> Any:
    """A request's message, a pydantic model, with fields that its class does not know."""
    missing = {name: value for name, value in fields.items() if name not in type(message).model_fields}
    if not missing:
        return message
    return _open_class(type(message)).model_construct(**dict(message), **missing)


@functools.cache
def _open_class(model: type) -> Any:
    return type(model.__name__, (model,), {"model_config": {"extra": "allow"}, "__module__": model.__module__})


def in_tree_tool_detector() -> type:
    found: type = private("sglang.srt.function_call.kimik2_detector", "KimiK2Detector")
    return found


def replace_tool_detector(changes: Registration, parser: str, module: str, name: str) -> None:
    parsers = private("sglang.srt.function_call.function_call_parser", "FunctionCallParser").ToolCallParserEnum
    changes.item(parsers, parser, getattr(importlib.import_module(module), name))


def finish_tokenizer(tokenizer: Any) -> Any:
    """What SGLang itself does to every tokenizer that it has loaded."""
    private(_TRANSFORMERS, "attach_additional_stop_token_ids")(tokenizer)
    return private("sglang.srt.utils.patch_tokenizer", "patch_tokenizer")(tokenizer)


def in_tree_config() -> type:
    found: type = private("sglang.srt.configs.kimi_k25", "KimiK25Config")
    return found


def in_tree_model() -> Any:
    return importlib.import_module("sglang.srt.models.kimi_k25")


def language_model() -> Any:
    """The class that the in-tree model has its text decoder from."""
    return private("sglang.srt.models.deepseek_v2", "DeepseekV3ForCausalLM")


def in_tree_media() -> Any:
    return importlib.import_module("sglang.srt.multimodal.processors.kimi_k25")


def router_gate() -> type:
    found: type = private("sglang.srt.models.deepseek_v2", "MoEGate")
    return found


def compressed_tensors_config() -> type:
    module = "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors"
    found: type = private(module, "CompressedTensorsConfig")
    return found


def moe_scheme_base() -> type:
    module = "sglang.srt.layers.quantization.compressed_tensors.schemes"
    found: type = private(module, "CompressedTensorsMoEScheme")
    return found


def moe_runner_backend() -> Any:
    """What `--moe-runner-backend` resolved to: the user's choice, or SGLang's for this GPU and checkpoint."""
    return private("sglang.srt.layers.moe.utils", "get_moe_runner_backend")()


def moe_all_to_all() -> Any:
    """What `--moe-a2a-backend` resolved to."""
    return private("sglang.srt.layers.moe.utils", "get_moe_a2a_backend")()


# A name with an underscore: SGLang allows notes of such names on its arguments, and sends them to its processes.
_GIVEN_RUNNER = "_k26_moe_runner"


def keep_given_runner(server_args: Any) -> None:
    """Note what the user gave as `--moe-runner-backend`, before SGLang settles its arguments."""
    if getattr(server_args, _GIVEN_RUNNER, None) is None:
        setattr(server_args, _GIVEN_RUNNER, server_args.moe_runner_backend)


def given_runner() -> str | None:
    """What `keep_given_runner` noted, `auto` where the flag was not given; None where nothing was (SGLang 0.5.10)."""
    return getattr(server_args(), _GIVEN_RUNNER, None)


def forget_media_embeddings() -> None:
    """Drop what the vision tower made of images: SGLang's flush after an update of the weights leaves it out."""
    name = "sglang.srt.managers.mm_schedule"
    cache = importlib.import_module(name if find_spec(name) else "sglang.srt.managers.mm_utils").embedding_cache
    if cache is not None:
        cache.clear()


def server_args() -> Any:
    """What the user started SGLang with."""
    if find_spec("sglang.srt.runtime_context") is not None:
        module = importlib.import_module("sglang.srt.runtime_context")
        if hasattr(module, "get_server_args"):
            return module.get_server_args()
    return private("sglang.srt.server_args", "get_global_server_args")()


@contextlib.contextmanager
def without_kt_wrapper() -> Iterator[None]:
    """Have SGLang build its fused-MoE layers without KTransformers' wrapper, whatever `--kt-…` says."""
    layer = importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")
    name = "create_kt_config_from_server_args"
    if hasattr(layer, name):
        original = getattr(layer, name)
        setattr(layer, name, lambda *args, **kwargs: None)
        try:
            yield
        finally:
            setattr(layer, name, original)
    else:
        # KTransformers' fork from 0.7 on has a switch of its own, for draft models.
        with private("sglang.srt.layers.moe.utils", "speculative_kt_ep_disabled_context")():
            yield


def is_cuda() -> bool:
    """Whether SGLang runs on NVIDIA GPUs: ROCm is another platform to it."""
    return bool(private("sglang.srt.utils", "is_cuda")())


def experts_scale_output() -> bool:
    """Whether the routed scaling factor is the experts' to apply: on CUDA SGLang's kernels do, elsewhere the layer does."""
    return is_cuda()


def device_type() -> str:
    return str(private("sglang.srt.utils", "get_device")()).split(":")[0]


def on_gpu(server_args: Any) -> bool:
    """Whether these arguments, not settled yet, mean a GPU."""
    return torch.cuda.is_available() and server_args.device in (None, "cuda")


def combine_input(hidden_states: torch.Tensor) -> Any:
    return private("sglang.srt.layers.moe.token_dispatcher", "StandardCombineInput")(hidden_states=hidden_states)


def torch_native_backend() -> Any:
    return private("sglang.srt.layers.attention.torch_native_backend", "TorchNativeAttnBackend")


def use_absorbed_mla_on_torch_native(backend: Callable[[Any], Any]) -> None:
    """Have the plain torch backend run MLA in its absorbed form, prefill too, by `backend`.

    The only form that this backend can: the other has keys and values of two sizes. Without this its prefill fails.
    """
    module = "sglang.srt.models.deepseek_common.attention_backend_handler"
    methods = private(
        "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods", "AttnForwardMethod"
    )
    private(module, "AttentionBackendRegistry").register("torch_native", lambda attention, batch: methods.MLA)
    private("sglang.srt.layers.attention.attention_registry", "ATTENTION_BACKENDS")["torch_native"] = backend
