"""Hides from raw completions in vLLM the markers of thinking and of tool calls that the model wrote as control tokens.

vLLM hides the tokens that a tokenizer calls special. The core's tokenizer does not call the markers special, because
vLLM's parsers of chats must find them in the text.
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
    """Wrap vLLM's `completion_stream_generator` so that a streamed completion has no markers in its text.

    vLLM would show them. The generator is given the engine's results with the markers taken out.
    """
    tokenizer = _tokenizer(serving, request)
    if tokenizer is not None:
        results = _without_markers(tokenizer, results)
    return original(serving, request, engine_inputs, results, *args, **kwargs)


def hide_whole(
    original: Callable[..., Any], serving: Any, results: list[Any], request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap vLLM's `request_output_to_completion_response` so that a whole completion has no markers in its text.

    vLLM would show them. The markers are taken out of the engine's results, in place.
    """
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
    """Take the markers out of an output's text, in place.

    Among the log probabilities a token that is not shown gets an empty text, because vLLM computes the offsets in the
    text from the tokens' texts.
    """
    output.text = text.shown(output.text, output.token_ids, finished=finished)
    for token_id, candidates in zip(output.token_ids, output.logprobs or (), strict=False):
        if token_id in tokenizer.special_ids:
            candidates[token_id] = dataclasses.replace(candidates[token_id], decoded_token="")


def _tokenizer(serving: Any, request: Any) -> KimiTokenizer | None:
    """Return the core's tokenizer, or None if another one serves or the client asks for special tokens."""
    plain: KimiTokenizer | None = getattr(serving.renderer.tokenizer, "plain", None)
    return plain if request.skip_special_tokens else None
