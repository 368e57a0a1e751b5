"""Raw completions in vLLM: their text without the markers that the model wrote as control tokens, as chats have it.

vLLM hides what a tokenizer calls special. The markers are not called so: its parsers of chats must find them in the text.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

from k26_plugins.common.prompt.token_text import TokenText
from k26_plugins.common.prompt.tokenizer import KimiTokenizer


def hide_streamed(
    original: Callable[..., Any],
    serving: Any,
    request: Any,
    engine_inputs: Any,
    results: AsyncIterator[tuple[int, Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The server-sent events of a completion, made of results without markers."""
    tokenizer = _tokenizer(serving, request)
    if tokenizer is not None:
        results = _without_markers(tokenizer, results)
    return original(serving, request, engine_inputs, results, *args, **kwargs)


def hide_whole(
    original: Callable[..., Any], serving: Any, results: list[Any], request: Any, *args: Any, **kwargs: Any
) -> Any:
    """The response of a completion, made of results without markers."""
    tokenizer = _tokenizer(serving, request)
    if tokenizer is not None:
        for result in results:
            for output in result.outputs:
                _hide(output, TokenText(tokenizer), tokenizer, finished=True)
    return original(serving, results, request, *args, **kwargs)


async def _without_markers(
    tokenizer: KimiTokenizer, results: AsyncIterator[tuple[int, Any]]
) -> AsyncIterator[tuple[int, Any]]:
    texts: dict[tuple[int, int], TokenText] = defaultdict(lambda: TokenText(tokenizer))
    async for prompt, result in results:
        for output in result.outputs:
            _hide(output, texts[prompt, output.index], tokenizer, finished=output.finish_reason is not None)
        yield prompt, result


def _hide(output: Any, text: TokenText, tokenizer: KimiTokenizer, *, finished: bool) -> None:
    """Change `output`: a token that is not shown gets an empty name, for vLLM counts places in the text by the names."""
    output.text = text.shown(output.text, output.token_ids, finished=finished)
    for token_id, candidates in zip(output.token_ids, output.logprobs or (), strict=False):
        if token_id in tokenizer.special_ids:
            candidates[token_id] = dataclasses.replace(candidates[token_id], decoded_token="")


def _tokenizer(serving: Any, request: Any) -> KimiTokenizer | None:
    """The core's; None where another serves, or where the client asks for special tokens."""
    plain: KimiTokenizer | None = getattr(serving.renderer.tokenizer, "plain", None)
    return plain if request.skip_special_tokens else None
