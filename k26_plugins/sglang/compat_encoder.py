"""What the adapter touches of SGLang's servers of the encoder alone and without it, beside `compat`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from k26_plugins.sglang import compat, names


def asks_the_model() -> bool:
    """Whether this SGLang's server of the encoder alone lets the model's class prepare the media, as `encoder` needs."""
    return compat.ENGINE.has_module(names.ENCODER_CONFIG) and compat.ENGINE.has_module(names.LOAD_ENCODER_ITEM)


def in_its_threads() -> Any:
    """What a model's class says of itself to have its media prepared in SGLang's threads; before 0.5.23 there is no such
    word, and its event loop does it."""
    config = compat.private(names.ENCODER_CONFIG)
    wish = {"preprocess_off_event_loop": True}
    return config(**wish) if wish.keys() <= {field.name for field in fields(config)} else config()


def model_folder() -> tuple[str, str | None]:
    """Where SGLang looks for a checkpoint's processors: a name or a folder, and its revision."""
    arguments = compat.server_args()
    return arguments.tokenizer_path or arguments.model_path, arguments.revision


def encodes_here_too() -> bool:
    """Whether a server with `--language-only` is to encode some requests' images itself."""
    return bool(getattr(compat.server_args(), "enable_adaptive_dispatch_to_encoder", False))


def encodes_elsewhere() -> bool:
    """Whether the images of all requests to this server are to be encoded by another."""
    return bool(getattr(compat.server_args(), "language_only", False)) and not encodes_here_too()
