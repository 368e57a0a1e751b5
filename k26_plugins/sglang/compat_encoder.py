"""Looks up what the adapter needs of SGLang's servers of the encoder alone and of those without an encoder.

`compat` looks up the rest.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from k26_plugins.sglang import compat, names


def asks_the_model() -> bool:
    """Return whether this release's server of the encoder alone lets the model's class prepare media."""
    return compat.ENGINE.has_module(names.ENCODER_CONFIG) and compat.ENGINE.has_module(names.LOAD_ENCODER_ITEM)


def in_its_threads() -> Any:
    """Return the settings by which a model asks SGLang to prepare its media in threads.

    Before 0.5.23 SGLang has no such setting, and its event loop prepares them.
    """
    config = compat.private(names.ENCODER_CONFIG)
    wish = {"preprocess_off_event_loop": True}
    return config(**wish) if wish.keys() <= {field.name for field in fields(config)} else config()


def model_folder() -> tuple[str, str | None]:
    """Return the name or folder in which SGLang looks for a checkpoint's processors, and the revision."""
    arguments = compat.server_args()
    return arguments.tokenizer_path or arguments.model_path, arguments.revision


def encodes_here_too() -> bool:
    """Return whether a server with `--language-only` is to encode the images of some requests itself."""
    return bool(getattr(compat.server_args(), "enable_adaptive_dispatch_to_encoder", False))


def encodes_elsewhere() -> bool:
    """Return whether another server is to encode the images of all requests to this server."""
    return bool(getattr(compat.server_args(), "language_only", False)) and not encodes_here_too()
