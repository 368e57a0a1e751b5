"""What this adapter looks up and changes in SGLang, by the names of `names.py`.

Where releases differ, KTransformers' fork among them, the difference is detected here, by feature and not by version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
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

# By the distribution's name, in the order in which they are looked for.
CHECKED_VERSIONS = {"sglang": "0.5.10 to 0.5.23", "sglang-kt": "0.7.2 to 0.7.2"}
MODEL_TYPE = "kimi_k25"
MODELS_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
MEDIA_VARIABLE = "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE"


# As SGLang's own registry of hooks has it, which releases before it lack and which would import too much for some names.
ENGINE = Engine(
    CHECKED_VERSIONS, "a newer k26-plugins; SGLANG_PLUGINS=none runs SGLang without it", wraps_everywhere=True
)
private = ENGINE.private
wrap = ENGINE.wrap
distribution = ENGINE.distribution
sglang_version = ENGINE.release


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
    if chosen != package or hasattr(sys.modules.get(names.MODEL_REGISTRY.module), names.MODEL_REGISTRY.attribute):
        registry = private(names.MODEL_REGISTRY)
        # Where SGLang has put off its own models, it puts another mapping in the place of `models` with them.
        registry.get_supported_archs()
        register = functools.partial(registry.register, package, overwrite=True)
        changes.entry(registry.models, ARCHITECTURE, register)


def registered_model() -> type | None:
    """The class that SGLang's registry has for this architecture, after ours was imported: the registry only logs that it
    could not be, and takes its own. Raises what the import raises."""
    importlib.import_module("k26_plugins.sglang.models.entry")
    found: type | None = private(names.MODEL_REGISTRY).models.get(ARCHITECTURE)
    return found


def _config_registry() -> Any:
    return private(ENGINE.first(names.CONFIG_REGISTRY, names.CONFIG_REGISTRY_BEFORE))


def registered_config() -> type | None:
    """The configuration class that SGLang has for this model type."""
    found: type | None = _config_registry().get(MODEL_TYPE)
    return found


def register_config(changes: Registration, module: str, name: str) -> None:
    """Replace the configuration class of this model type by `module.name`."""
    changes.item(_config_registry(), MODEL_TYPE, getattr(importlib.import_module(module), name))


def register_processor(changes: Registration, module: str, name: str) -> None:
    """Have SGLang build `module.name` as this model type's processor."""
    processors = private(names.CUSTOMIZED_PROCESSORS)
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


def _get_tokenizer() -> EngineName:
    return ENGINE.first(names.GET_TOKENIZER, names.GET_TOKENIZER_BEFORE)


def get_tokenizer(name: str, revision: str | None) -> Any:
    """The tokenizer as SGLang loads it, through the hook of `register_tokenizer_hook`."""
    return private(_get_tokenizer())(name, tokenizer_revision=revision)


def has_entry_point() -> bool:
    """Whether this SGLang loads plugins: 0.5.10 and KTransformers' fork do not, see `boot`."""
    return ENGINE.has_module(names.LOAD_PLUGINS)


def register_tokenizer_hook(changes: Registration, module: str, name: str) -> None:
    """Put `module.name(original, *args, **kwargs)` around SGLang's `get_tokenizer`, wherever it was imported to."""
    hook = getattr(importlib.import_module(module), name)
    if has_entry_point():
        registry, around, target = private(names.HOOK_REGISTRY), private(names.HOOK_TYPE).AROUND, str(_get_tokenizer())
        registered = registry._hooks

        def register() -> Callable[[], None]:
            before = list(registered.get(target, ()))
            if not any(found is hook for _, found, _ in before):
                registry.register(target, hook, around)
            registry.apply_hooks()
            return lambda: registered.__setitem__(target, before)

        changes.call(register)
    else:
        wrap(changes, _get_tokenizer(), hook)


def register_argument_hook(changes: Registration, module: str, name: str) -> None:
    """Have `module.name(original, server_args)` called before SGLang settles its arguments, in the launching process."""
    settling = ENGINE.first(names.RESOLVE_ARGUMENTS, names.RESOLVE_ARGUMENTS_BEFORE)
    if not ENGINE.has(settling):
        # 0.5.10, which imports this adapter in the middle of that module: there the flags stay the user's.
        return
    wrap(changes, settling, getattr(importlib.import_module(module), name))


def serves_chats() -> bool:
    """Whether this process is an API server."""
    return names.HTTP_SERVER.module in sys.modules


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
    get = private(names.GET_IMAGE_BYTES)
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
    normalize = private(ENGINE.first(names.NORMALIZE_VIDEO, names.GET_IMAGE_BYTES))
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
    if not ENGINE.has(names.LOADED_IMAGE):
        return image
    return private(names.LOADED_IMAGE)(image, private(names.SNAPSHOT_MEDIA)(content).content_digest)


def with_fields(message: Any, fields: dict[str, str]) -> Any:
    """A request's message, a pydantic model, with fields that its class does not know."""
    missing = {name: value for name, value in fields.items() if name not in type(message).model_fields}
    if not missing:
        return message
    return _open_class(message.__class__).model_construct(**dict(message), **missing)


@functools.cache
def _open_class(model: type) -> Any:
    return type(model.__name__, (model,), {"model_config": {"extra": "allow"}, "__module__": model.__module__})


def in_tree_tool_detector() -> type:
    found: type = private(names.TOOL_DETECTOR)
    return found


def replace_tool_detector(changes: Registration, parser: str, module: str, name: str) -> None:
    parsers = private(names.TOOL_PARSERS)
    changes.item(parsers, parser, getattr(importlib.import_module(module), name))


def finish_tokenizer(tokenizer: Any) -> Any:
    """What SGLang itself does to every tokenizer that it has loaded."""
    private(names.STOP_TOKEN_IDS)(tokenizer)
    return private(names.PATCH_TOKENIZER)(tokenizer)


def in_tree_config() -> type:
    found: type = private(names.IN_TREE_CONFIG)
    return found


def in_tree_model() -> Any:
    return private(names.IN_TREE_MODEL)


def language_model() -> Any:
    """The class that the in-tree model has its text decoder from."""
    return private(names.LANGUAGE_MODEL)


def in_tree_media() -> Any:
    return private(names.IN_TREE_MEDIA)


def router_gate() -> type:
    found: type = private(names.ROUTER_GATE)
    return found


def compressed_tensors_config() -> type[Any]:
    found: type[Any] = private(names.COMPRESSED_TENSORS)
    return found


def moe_scheme_base() -> type:
    found: type = private(names.MOE_SCHEME)
    return found


def moe_runner_backend() -> Any:
    """What `--moe-runner-backend` resolved to: the user's choice, or SGLang's for this GPU and checkpoint."""
    return private(names.RUNNER_BACKEND)()


def moe_all_to_all() -> Any:
    """What `--moe-a2a-backend` resolved to."""
    return private(names.ALL_TO_ALL_BACKEND)()


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
    cache = private(ENGINE.first(names.EMBEDDING_CACHE, names.EMBEDDING_CACHE_BEFORE))
    if cache is not None:
        cache.clear()


def server_args() -> Any:
    """What the user started SGLang with."""
    return private(ENGINE.first(names.GET_SERVER_ARGS, names.GET_SERVER_ARGS_BEFORE))()


@contextlib.contextmanager
def without_kt_wrapper() -> Iterator[None]:
    """Have SGLang build its fused-MoE layers without KTransformers' wrapper, whatever `--kt-…` says."""
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
    """Whether SGLang runs on NVIDIA GPUs: ROCm is another platform to it."""
    return bool(private(names.IS_CUDA)())


def experts_scale_output() -> bool:
    """Whether the routed scaling factor is the experts' to apply: on CUDA SGLang's kernels do, elsewhere the layer does."""
    return is_cuda()


def device_type() -> str:
    return str(private(names.GET_DEVICE)()).split(":")[0]


def on_gpu(server_args: Any) -> bool:
    """Whether these arguments, not settled yet, mean a GPU."""
    return torch.cuda.is_available() and server_args.device in (None, "cuda")


def combine_input(hidden_states: torch.Tensor) -> Any:
    return private(names.COMBINE_INPUT)(hidden_states=hidden_states)


def torch_native_backend() -> Any:
    return private(names.TORCH_NATIVE)


def use_absorbed_mla_on_torch_native(backend: Callable[[Any], Any]) -> None:
    """Have the plain torch backend run MLA in its absorbed form, prefill too, by `backend`. Without it prefill fails."""
    methods = private(names.FORWARD_METHOD)
    private(names.FORWARD_REGISTRY).register("torch_native", lambda attention, batch: methods.MLA)
    private(names.ATTENTION_BACKENDS)["torch_native"] = backend
