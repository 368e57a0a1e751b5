"""Grammars of answers in SGLang, which compiles them in the scheduler's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.for_grammars import for_grammars


def create_backend(original: Callable[..., Any], server_args: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Around what makes the backend that the user chose, of the model's tokenizer."""
    return original(server_args, for_grammars(tokenizer), *args, **kwargs)
