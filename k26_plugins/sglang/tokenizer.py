"""Gives SGLang the core's tokenizer wherever it loads one for this model, by a hook around SGLang's `get_tokenizer`."""

from __future__ import annotations

from collections.abc import Callable
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


def get_tokenizer(original: Callable[..., Any], tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """Wrap SGLang's `get_tokenizer` so that it returns the core's tokenizer for this model.

    SGLang loads the tokenizer itself for another model, or if the user chose a tokenizer mode or the checkpoint brings
    another tokenizer. No Python file of the checkpoint is executed. In an API server this call also installs the hooks
    around chats, and in the scheduler's process those around grammars.
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
    small_files = tokenizer_folder(folder, revision)
    return compat.finish_tokenizer(load_hf_tokenizer(small_files, video_place=CHUNK_PLACE, name_or_path=str(folder)))
