"""Looks up and changes SGLang's objects for this adapter, by the names of `names.py`.

Where releases of SGLang differ, KTransformers' fork among them, this module detects the difference by feature and not
by version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.adapters.engine import Engine, EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.common.multimodal.data_url import data_url_bytes, is_data_url, require_url
from k26_plugins.sglang import names

# The checked releases by the distribution's name, in the order in which distributions are looked for.
CHECKED_VERSIONS = {"sglang": "0.5.10 to 0.5.23", "sglang-kt": "0.7.2 to 0.7.2"}
MODEL_TYPE = "kimi_k25"
MODELS_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
MEDIA_VARIABLE = "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"


# A wrapped function is replaced in every module that imported it, as SGLang's own registry of hooks does. That registry
# is not used, because older releases do not have it, and because for some names it would import too much.
ENGINE = Engine(
    CHECKED_VERSIONS, "a newer k26-plugins; SGLANG_PLUGINS=none runs SGLang without it", wraps_everywhere=True
)
private = ENGINE.private
wrap = ENGINE.wrap
distribution = ENGINE.distribution
sglang_version = ENGINE.release


# Each `register_…` function looks up the names that it needs and notes changes, which `Registration.apply` makes.


def register_models(changes: Registration, package: str) -> None:
    """Have SGLang's registry prefer the model class of `package` to the in-tree class of the same name.

    This sets the environment variable that SGLang reads when it builds the registry, and child processes inherit the
    variable. Importing the model here would import every model of SGLang before SGLang has parsed its arguments.
    """
    chosen = os.environ.get(MODELS_VARIABLE, package)
    if MODELS_VARIABLE not in os.environ:
        changes.item(os.environ, MODELS_VARIABLE, package)
    # If the module is imported but has no registry yet, it is in the middle of its import and will read the variable.
    if chosen != package or hasattr(sys.modules.get(names.MODEL_REGISTRY.module), names.MODEL_REGISTRY.attribute):
        registry = private(names.MODEL_REGISTRY)
        # In releases that import SGLang's own models late, this call does so and replaces the mapping `models`.
        registry.get_supported_archs()
        register = functools.partial(registry.register, package, overwrite=True)
        changes.entry(registry.models, ARCHITECTURE, register)


def registered_model() -> type | None:
    """Import the plugin's model class, and return the class that SGLang's registry has for this architecture.

    Raises whatever the import raises. The registry itself would only log such an error and take SGLang's own class.
    """
    importlib.import_module("k26_plugins.sglang.models.entry")
    found: type | None = private(names.MODEL_REGISTRY).models.get(ARCHITECTURE)
    return found


def _config_registry() -> Any:
    return private(ENGINE.first(names.CONFIG_REGISTRY, names.CONFIG_REGISTRY_BEFORE))


def registered_config() -> type | None:
    """Return the configuration class that SGLang's registry has for this model type, or None."""
    found: type | None = _config_registry().get(MODEL_TYPE)
    return found


def register_config(changes: Registration, module: str, name: str) -> None:
    """Register the class `module.name` as the configuration class of this model type."""
    changes.item(_config_registry(), MODEL_TYPE, getattr(importlib.import_module(module), name))


def register_processor(changes: Registration, module: str, name: str) -> None:
    """Register the class `module.name` as the processor of this model type."""
    processors = private(names.CUSTOMIZED_PROCESSORS)
    changes.item(processors, MODEL_TYPE, getattr(importlib.import_module(module), name))


def register_media(changes: Registration, package: str) -> None:
    """Have SGLang prefer the media classes of `package` to its own for the same model, by an environment variable.

    Raises UnsupportedEngineError if the user named another such package, because SGLang takes only one.
    """
    chosen = os.environ.get(MEDIA_VARIABLE, package)
    if chosen != package:
        raise UnsupportedEngineError(
            f"{MEDIA_VARIABLE} is {chosen!r}, and SGLang takes one package: unset it to have images prepared by "
            f"k26-plugins."
        )
    changes.item(os.environ, MEDIA_VARIABLE, package)


def _get_tokenizer() -> EngineName:
    return ENGINE.first(names.GET_TOKENIZER, names.GET_TOKENIZER_BEFORE)


def get_tokenizer(name: str, revision: str | None) -> Any:
    """Load a tokenizer by SGLang's own function, around which `register_tokenizer_hook` puts the plugin's hook."""
    return private(_get_tokenizer())(name, tokenizer_revision=revision)


def has_entry_point() -> bool:
    """Return whether this release loads plugins. SGLang 0.5.10 and KTransformers' fork do not: see `boot`."""
    return ENGINE.has_module(names.LOAD_PLUGINS)


def register_tokenizer_hook(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(original, …)` called in the place of `get_tokenizer`, in every module that imported it."""
    hook = getattr(importlib.import_module(module), name)
    if has_entry_point():
        registry, around, target = private(names.HOOK_REGISTRY), private(names.HOOK_TYPE).AROUND, str(_get_tokenizer())
        registered = private(names.HOOKS)

        def register() -> Callable[[], None]:
            before = list(registered.get(target, ()))
            if not any(found is hook for _, found, _ in before):
                registry.register(target, hook, around)
            registry.apply_hooks()
            return lambda: registered.__setitem__(target, before)

        changes.call(register)
    else:
        wrap(changes, _get_tokenizer(), hook)


def hook_loading_of_media(around: Callable[..., Any]) -> None:
    """Have `around(original, data, modality, …)` called where KTransformers' fork loads one medium.

    The fork calls its base class's static method, whatever a model's class overrides. SGLang itself calls the method of the
    model's class, so nothing is done there.
    """
    base = private(names.LOAD_SINGLE_ITEM_OF_BASE.owner)
    if isinstance(inspect.getattr_static(base, names.LOAD_SINGLE_ITEM_OF_BASE.attribute), staticmethod):
        ENGINE.hook(around, names.LOAD_SINGLE_ITEM_OF_BASE)


def hook_gpu_call(around: Callable[..., Any]) -> None:
    """Have `around(original, wrapper, text, images, …)` called where SGLang would prepare images on a GPU.

    Nothing is done in SGLang 0.5.10, which prepares them in the processor only.
    """
    if ENGINE.has(names.GPU_CALL):
        ENGINE.hook(around, names.GPU_CALL)


def register_argument_hook(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(original, server_args)` called before SGLang settles its arguments, in the launching process."""
    settling = ENGINE.first(names.RESOLVE_ARGUMENTS, names.RESOLVE_ARGUMENTS_BEFORE)
    if not ENGINE.has(settling):
        # SGLang 0.5.10 imports this adapter in the middle of that module's import: there the user's flags stay as they
        # are.
        return
    wrap(changes, settling, getattr(importlib.import_module(module), name))


def serves_chats() -> bool:
    """Return whether this process is an API server."""
    return names.HTTP_SERVER.module in sys.modules


def _held(source: Any) -> bytes | None:
    """Return the bytes that a `data:` URL holds, or None for another source.

    SGLang itself reads base64 in one form only. Raises MediaError, also for an empty URL.
    """
    if not isinstance(source, str):
        return None
    require_url(source)
    return data_url_bytes(source) if is_data_url(source) else None


def image_bytes(data: Any) -> bytes | None:
    """Return the bytes of an image that a request gives, or None if it gives no file but an array or an embedding.

    Raises ValueError if the bytes cannot be fetched or decoded.
    """
    source = getattr(data, "url", data)
    if not isinstance(source, str | bytes):
        return None
    if (held := _held(source)) is not None:
        return held
    get = private(names.GET_IMAGE_BYTES)
    try:
        found: bytes = get(source)
    except OSError as error:
        raise ValueError(f"the image cannot be fetched: {error}") from error
    return found


def video_bytes(data: Any) -> bytes:
    """Return the bytes of a video that a request gives. Raises ValueError if they cannot be fetched or decoded."""
    source = getattr(data, "url", data)
    if (held := _held(source)) is not None:
        return held
    # KTransformers' fork has no function for videos. There a video is fetched as an image is.
    normalize = private(ENGINE.first(names.NORMALIZE_VIDEO, names.GET_IMAGE_BYTES))
    try:
        source = normalize(source)
        if source is None:
            raise ValueError(f"a video was given as {type(data).__name__}: send a URL or the file's data.")
        return source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ValueError(f"the video cannot be fetched: {error}") from error


def loaded_image(image: Any, content: Any) -> Any:
    """Return an image together with the digest of `content`, if this release's class for the model expects a digest.

    image: a PIL image or a chunk of a video. content: what the digest is made of.
    """
    # SGLang expects a digest since 0.5.23. Its cache of images is older, but held none of this model's before.
    if not ENGINE.has(names.LOADED_IMAGE):
        return image
    return private(names.LOADED_IMAGE)(image, private(names.SNAPSHOT_MEDIA)(content).content_digest)


def with_fields(message: Any, fields: dict[str, str]) -> Any:
    """Return a request's message, a pydantic model, with further fields that its class does not have."""
    missing = {name: value for name, value in fields.items() if name not in type(message).model_fields}
    if not missing:
        return message
    return _open_class(message.__class__).model_construct(**dict(message), **missing)


@functools.cache
def _open_class(model: type) -> Any:
    return type(model.__name__, (model,), {"model_config": {"extra": "allow"}, "__module__": model.__module__})


def in_tree_tool_detector() -> type:
    """Return the class of SGLang's own tool-call parser for this model."""
    found: type = private(names.TOOL_DETECTOR)
    return found


def replace_tool_detector(changes: Registration, parser: str, module: str, name: str) -> None:
    """Register the class `module.name` as the tool-call parser of the name `parser`."""
    parsers = private(names.TOOL_PARSERS)
    changes.item(parsers, parser, getattr(importlib.import_module(module), name))


def finish_tokenizer(tokenizer: Any) -> Any:
    """Do to a tokenizer what SGLang does to every tokenizer that it has loaded, and return the tokenizer."""
    private(names.STOP_TOKEN_IDS)(tokenizer)
    return private(names.PATCH_TOKENIZER)(tokenizer)


def in_tree_config() -> type:
    """Return SGLang's configuration class for this model."""
    found: type = private(names.IN_TREE_CONFIG)
    return found


def in_tree_model() -> Any:
    """Return SGLang's module that has the in-tree model class."""
    return private(names.IN_TREE_MODEL)


def language_model() -> Any:
    """Return the class of the in-tree model's language model."""
    return private(names.LANGUAGE_MODEL)


def in_tree_media() -> Any:
    """Return SGLang's module that has the in-tree media classes."""
    return private(names.IN_TREE_MEDIA)


def router_gate() -> type:
    """Return SGLang's class of the router's gate."""
    found: type = private(names.ROUTER_GATE)
    return found


def compressed_tensors_config() -> type[Any]:
    """Return the class of the quantization configuration that SGLang makes for the published checkpoint."""
    found: type[Any] = private(names.COMPRESSED_TENSORS)
    return found


def moe_scheme_base() -> type:
    """Return the base class of SGLang's compressed-tensors schemes for fused-MoE layers."""
    found: type = private(names.MOE_SCHEME)
    return found


def moe_runner_backend() -> Any:
    """Return what `--moe-runner-backend` resolved to: the user's choice, or SGLang's for this GPU and checkpoint."""
    return private(names.RUNNER_BACKEND)()


def moe_all_to_all() -> Any:
    """Return what `--moe-a2a-backend` resolved to."""
    return private(names.ALL_TO_ALL_BACKEND)()


# The attribute that notes the user's choice on SGLang's arguments. Its name begins with an underscore, because SGLang
# allows additional attributes with such names and sends them to its processes.
_GIVEN_RUNNER = "_k26_moe_runner"


def keep_given_runner(server_args: Any) -> None:
    """Note on SGLang's arguments what the user gave as `--moe-runner-backend`, before SGLang settles them."""
    if getattr(server_args, _GIVEN_RUNNER, None) is None:
        setattr(server_args, _GIVEN_RUNNER, server_args.moe_runner_backend)


def given_runner() -> str | None:
    """Return what `keep_given_runner` noted.

    This is `auto` if the user gave no flag, and None if nothing was noted (SGLang 0.5.10).
    """
    return getattr(server_args(), _GIVEN_RUNNER, None)


def forget_media_embeddings() -> None:
    """Drop SGLang's cached embeddings of images, which its flush after an update of the weights does not drop."""
    cache = private(ENGINE.first(names.EMBEDDING_CACHE, names.EMBEDDING_CACHE_BEFORE))
    if cache is not None:
        cache.clear()


def server_args() -> Any:
    """Return the arguments with which SGLang was started."""
    return private(ENGINE.first(names.GET_SERVER_ARGS, names.GET_SERVER_ARGS_BEFORE))()


@contextlib.contextmanager
def without_kt_wrapper() -> Iterator[None]:
    """Have SGLang build fused-MoE layers without KTransformers' wrapper inside this context, despite its `--kt-…`
    flags."""
    if ENGINE.has(names.KT_CONFIG):
        layer, name, original = private(names.KT_CONFIG.owner), names.KT_CONFIG.attribute, private(names.KT_CONFIG)
        setattr(layer, name, lambda *args, **kwargs: None)
        try:
            yield
        finally:
            setattr(layer, name, original)
    else:
        with private(names.KT_SWITCH)():
            yield


def is_cuda() -> bool:
    """Return whether SGLang runs on NVIDIA GPUs. ROCm is another platform for SGLang."""
    return bool(private(names.IS_CUDA)())


def experts_scale_output() -> bool:
    """Return whether the experts must apply the routed scaling factor.

    On CUDA SGLang leaves it to the experts' kernels; elsewhere the layer applies it.
    """
    return is_cuda()


def device_type() -> str:
    """Return the type of the device that SGLang runs on, such as `cuda` or `cpu`."""
    return str(private(names.GET_DEVICE)()).split(":")[0]


def on_gpu(server_args: Any) -> bool:
    """Return whether SGLang will run on a GPU with these arguments, which are not settled yet."""
    return torch.cuda.is_available() and server_args.device in (None, "cuda")


def combine_input(hidden_states: torch.Tensor) -> Any:
    """Return SGLang's object in which a scheme hands over what the experts computed."""
    return private(names.COMBINE_INPUT)(hidden_states=hidden_states)


def torch_native_backend() -> Any:
    """Return the class of SGLang's plain torch attention backend."""
    return private(names.TORCH_NATIVE)


def use_absorbed_mla_on_torch_native(backend: Callable[[Any], Any]) -> None:
    """Have SGLang run MLA in its absorbed form, for prefill too, by `backend` in the place of the plain torch backend.

    Otherwise prefill fails on that backend.
    """
    methods = private(names.FORWARD_METHOD)
    private(names.FORWARD_REGISTRY).register("torch_native", lambda attention, batch: methods.MLA)
    private(names.ATTENTION_BACKENDS)["torch_native"] = backend
