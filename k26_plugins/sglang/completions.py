"""Hides from raw completions in SGLang the markers of thinking and of tool calls, which the model wrote as control
tokens.

SGLang hides the tokens that a tokenizer calls special. The core's tokenizer does not call the markers special, because
SGLang's parsers of chats must find them in the text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from k26_plugins.common.prompt.token_text import TokenText
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.sglang import compat_chats


def hide_markers(original: Callable[..., None], serving: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap the constructor of SGLang's completions (and of its Ollama API) so that their texts have no markers.

    The serving object sends the texts of its tokenizer manager, so it gets a manager that takes the markers out.
    Releases before 0.5.23 do not say which token ids a chunk brings, and keep showing the markers.
    """
    original(serving, *args, **kwargs)
    if compat_chats.counts_output_ids():
        serving.tokenizer_manager = _Manager(serving.tokenizer_manager)


class _Manager:
    """SGLang's `TokenizerManager`, except that the texts of its answers have no markers."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_request(self, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Return an iterator over answers or, if the client streams, over chunks, without markers in their texts.

        If the client asks for special tokens, the texts stay as they are.
        """
        answers: AsyncIterator[Any] = self._manager.generate_request(request, *args, **kwargs)
        tokenizer = getattr(self._manager.tokenizer, "plain", None)
        if tokenizer is None or not request.sampling_params.get("skip_special_tokens", True):
            return answers
        return _streamed(tokenizer, answers) if request.stream else _whole(tokenizer, answers)


async def _whole(tokenizer: KimiTokenizer, answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for answer in answers:
        if isinstance(answer, list):
            yield [_hidden(one, _text(tokenizer, one), tokenizer) for one in answer]
        else:
            yield _hidden(answer, _text(tokenizer, answer), tokenizer)


def _text(tokenizer: KimiTokenizer, answer: dict[str, Any]) -> str:
    return TokenText(tokenizer).shown(answer["text"], answer["output_ids"], finished=True)


async def _streamed(tokenizer: KimiTokenizer, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    choices: dict[int, _Choice] = {}
    async for chunk in chunks:
        choice = choices.setdefault(chunk.get("index", 0), _Choice(tokenizer))
        yield _hidden(chunk, choice.next(chunk), tokenizer)


class _Choice:
    """The text of one streamed answer of a request."""

    def __init__(self, tokenizer: KimiTokenizer) -> None:
        self._text = TokenText(tokenizer)
        self._given_out = 0
        self._shown = ""

    def next(self, chunk: dict[str, Any]) -> str:
        """Return the text for SGLang's next chunk: what is new or everything so far, whichever the chunk itself has."""
        reason = chunk["meta_info"].get("finish_reason")
        new = compat_chats.new_output_ids(chunk, self._text.num_tokens, reason["type"] if reason else None)
        text, self._given_out = compat_chats.new_text(chunk, self._given_out)
        shown = self._text.shown(text, new, finished=reason is not None)
        if compat_chats.sends_increments():
            return shown
        self._shown += shown
        return self._shown


def _hidden(answer: dict[str, Any], text: str, tokenizer: KimiTokenizer) -> dict[str, Any]:
    """Return a copy of an answer with another text, in whose log probabilities hidden tokens have an empty text."""
    meta = answer["meta_info"]
    if meta.get("output_token_logprobs"):
        named = [
            (value, token_id, "" if token_id in tokenizer.special_ids else name)
            for value, token_id, name in meta["output_token_logprobs"]
        ]
        meta = {**meta, "output_token_logprobs": named}
    return {**answer, "text": text, "meta_info": meta}
