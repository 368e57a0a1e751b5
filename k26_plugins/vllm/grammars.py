"""Grammars of answers in vLLM, which compiles them in the engine's own process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.for_grammars import for_grammars


def grammar_tokenizer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around the tokenizer of vLLM's manager of structured output."""
    return for_grammars(original(*args, **kwargs))
