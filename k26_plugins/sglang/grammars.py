"""Gives SGLang's compilers of grammars the tokenizer as they should see it. They run in the scheduler's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k26_plugins.common.prompt.for_grammars import for_grammars


def create_backend(original: Callable[..., Any], server_args: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap SGLang's `create_grammar_backend` so that grammars are compiled for a copy of the tokenizer made for them.

    With the tokenizer as it is, a grammar would end answers with `[EOS]`, with which this model ends none, and would
    allow control tokens inside strings.
    """
    return original(server_args, for_grammars(tokenizer), *args, **kwargs)
