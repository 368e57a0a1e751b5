"""The core's tokenizer wherever SGLang asks for one of this model's: a hook around its `get_tokenizer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.hf_tokenizer import is_this_model, load_hf_tokenizer, tokenizer_folder
from k26_plugins.common.prompt.special_tokens import CHUNK_PLACE
from k26_plugins.sglang import compat, serving


def get_tokenizer(original: Callable[..., Any], tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own for another model, or where the user chose a `--tokenizer-mode`. No file of it is executed."""
    revision = kwargs.get("revision") or kwargs.get("tokenizer_revision")
    folder = compat.object_store_folder(tokenizer_name)
    if kwargs.get("tokenizer_mode", "auto") != "auto" or not is_this_model(folder, revision):
        return original(tokenizer_name, *args, **kwargs)
    return compat.finish_tokenizer(load_tokenizer(folder, revision))


def load_tokenizer(name: str, revision: str | None) -> Any:
    """The core's tokenizer, and in an API server the hooks that belong to it."""
    if compat.serves_chats():
        serving.install()
    tokenizer = load_hf_tokenizer(tokenizer_folder(name, revision), name_or_path=str(name))
    tokenizer.video_place = CHUNK_PLACE
    return tokenizer
