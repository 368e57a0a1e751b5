"""The core's tokenizer wherever SGLang asks for one of this model's: a hook around its `get_tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from k26_plugins.common.config import ARCHITECTURE
from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer, tokenizer_folder
from k26_plugins.sglang import compat


def get_tokenizer(original: Callable[..., Any], tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """SGLang's own for another model, or where the user chose a `--tokenizer-mode`. No file of it is executed."""
    revision = kwargs.get("revision") or kwargs.get("tokenizer_revision")
    if kwargs.get("tokenizer_mode", "auto") != "auto" or not is_this_model(tokenizer_name, revision):
        return original(tokenizer_name, *args, **kwargs)
    return compat.finish_tokenizer(load_tokenizer(tokenizer_name, revision))


def load_tokenizer(name: str, revision: str | None) -> Any:
    return load_hf_tokenizer(tokenizer_folder(name, revision), name_or_path=str(name))


def is_this_model(name: str, revision: str | None) -> bool:
    """Whether the folder, or the model on the hub, has a config.json of this architecture."""
    try:
        file = cached_file(str(name), "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        config = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return False
    return ARCHITECTURE in (config.get("architectures") or [])
