"""Gives vLLM's compilers of grammars, which run in the engine core's process, the tokenizer as they should see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.for_grammars import for_grammars


def grammar_tokenizer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrap vLLM's `cached_tokenizer_from_config` so that structured output gets a copy of the tokenizer for grammars.

    With the tokenizer as it is, a grammar would end answers with `[EOS]`, with which this model ends none, and would
    allow control tokens inside strings.
    """
    return for_grammars(original(*args, **kwargs))
