"""What both engines are given of a model's answer: the core's parser over text and token ids, and its events as pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from k26_plugins.common.prompt.call_names import Tools, is_object
from k26_plugins.common.prompt.output import (
    MARKERS,
    CallArguments,
    CallStart,
    Content,
    Event,
    OutputParser,
    Reasoning,
)
from k26_plugins.common.prompt.token_text import TokenText
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

REASONING_NAMES = ("reasoning", "reasoning_content")
"""vLLM's name, and the one of Moonshot's own API and SGLang: clients read the one or the other."""


class Answer:
    """One choice of an answer, whole or streamed."""

    def __init__(
        self, tokenizer: KimiTokenizer, *, in_reasoning: bool, tools: Tools | None, special_shown: bool = False
    ) -> None:
        """in_reasoning, tools: as of `OutputParser`. special_shown: the text has the names of special tokens."""
        self.text = TokenText(tokenizer, special_shown=special_shown)
        self._parser = OutputParser(in_reasoning=in_reasoning, tools=tools)

    def feed(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Event]:
        """The events of the next text and the token ids that it is made of. A whole answer may come without ids."""
        if finished and not token_ids and not self.text.num_tokens:
            return self._parser.feed(text) + self._parser.finish()
        events = self._parser.feed_pieces(self.text.split(text, token_ids))
        if finished:
            events += self._parser.feed_pieces(self.text.finish()) + self._parser.finish()
        return events


@dataclass(slots=True)
class CallPiece:
    """A tool call, or what is new of one."""

    index: int
    call_id: str | None = None
    """None, as the name, in a piece that goes on with a call."""
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Pieces:
    """What some events bring, put together."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


def pieces(events: Iterable[Event]) -> Pieces:
    """What events bring, with one piece for each call."""
    found = Pieces()
    calls: dict[int, CallPiece] = {}
    for event in events:
        match event:
            case Reasoning(text):
                found.reasoning += text
            case Content(text):
                found.content += text
            case CallStart(index, call_id, name):
                calls[index] = CallPiece(index, call_id, name)
            case CallArguments(index, text):
                calls.setdefault(index, CallPiece(index)).arguments += text
    found.calls = list(calls.values())
    return found


def schemas(tools: Iterable[Any]) -> Tools:
    """The parameters of a request's functions by their names; other tools are left out.

    tools: the engines' objects, as of the chat API (`tool.function.name`) or of the Responses API (`tool.name`).
    """
    functions = [getattr(tool, "function", tool) for tool in tools]
    return {
        function.name: getattr(function, "parameters", None) or {}
        for function in functions
        if isinstance(getattr(function, "name", None), str)
    }


def markers_are_ordinary(hf_tokenizer: Any) -> bool:
    """Whether the tokenizer counts the markers among the ordinary tokens, as the core's does: they are in an answer's text
    without any special token being shown for their sake."""
    return set(hf_tokenizer.all_special_tokens).isdisjoint(MARKERS)


def name_reasoning_twice(fields: dict[str, Any]) -> None:
    """Give the reasoning among a message's fields both names of `REASONING_NAMES`, in place."""
    for name in REASONING_NAMES:
        if fields.get(name) is not None:
            fields.update(dict.fromkeys(REASONING_NAMES, fields[name]))
            return


def make_cut_calls_text(message: Any) -> None:
    """In a chat's message, in place: calls whose arguments are no object, as where the token limit cut them, become text.

    For the Messages API, in which a call's input is an object.
    """
    cut = [call for call in message.tool_calls or () if not is_object(call.function.arguments)]
    if cut:
        message.tool_calls = [call for call in message.tool_calls if call not in cut]
        message.content = "\n".join(filter(None, [message.content, *(call.function.arguments for call in cut)]))
