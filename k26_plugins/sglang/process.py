"""Prepares a process of SGLang's to serve this model.

A process first says which model it serves when it asks SGLang's `get_tokenizer` for the tokenizer. So the adapter has its
hook there: another model's process stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from k26_plugins.common.prompt.hf_tokenizer import (
    core_serves_prompts,
    is_this_model,
    load_hf_tokenizer,
    tokenizer_folder,
)
from k26_plugins.common.prompt.special_tokens import CHUNK_PLACE
from k26_plugins.sglang import compat, compat_chats, compat_loading, logger, serving
from k26_plugins.sglang.grammars import create_backend


def prepare(original: Callable[..., Any], tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """Wrap SGLang's `get_tokenizer` so that a process which serves this model is prepared, and return the tokenizer.

    An API server's process gets the hooks around chats, the scheduler's process that around grammars, and every process
    the core's tokenizer. SGLang loads the tokenizer itself for another model, or if the user chose a tokenizer mode or the
    checkpoint brings another tokenizer. No Python file of the checkpoint is executed.
    """
    revision = kwargs.get("revision") or kwargs.get("tokenizer_revision")
    folder = compat_loading.object_store_folder(tokenizer_name)
    if not is_this_model(folder, revision):
        return original(tokenizer_name, *args, **kwargs)
    if compat.serves_chats():
        serving.install()
    if kwargs.get("tokenizer_mode", "auto") != "auto" or not core_serves_prompts(folder, revision):
        logger.info("k26-plugins: the tokenizer is SGLang's own.")
        return original(tokenizer_name, *args, **kwargs)
    compat_chats.hook_grammars(create_backend)
    return load_tokenizer(folder, revision)


def load_tokenizer(folder: str | Path, revision: str | None) -> Any:
    """Return the core's tokenizer, with the attributes that SGLang's own loading gives it. It changes nothing else.

    folder: the checkpoint's, or its name on the hub.
    """
    small_files = tokenizer_folder(folder, revision)
    return compat.finish_tokenizer(load_hf_tokenizer(small_files, video_place=CHUNK_PLACE, name_or_path=str(folder)))
