"""Parses a model's answer for both engines: the core's parser reads its text and token ids, and the parser's events are
put together as pieces from which an adapter makes its engine's objects."""

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
"""The two names of a message's reasoning: vLLM's, and that of Moonshot's own API and SGLang. A client reads either."""


class Answer:
    """The parser of one choice of an answer, whole or streamed."""

    def __init__(
        self, tokenizer: KimiTokenizer, *, in_reasoning: bool, tools: Tools | None, special_shown: bool = False
    ) -> None:
        """Prepare for an answer of which nothing has been read yet.

        in_reasoning, tools: as `OutputParser` takes them. special_shown: whether the engine's text contains the names
        of special tokens.
        """
        self.text = TokenText(tokenizer, special_shown=special_shown)
        self._parser = OutputParser(in_reasoning=in_reasoning, tools=tools)

    def feed(self, text: str, token_ids: Sequence[int], *, finished: bool) -> list[Event]:
        """Return the events of the next text.

        token_ids: the ids that `text` was decoded from; a whole answer, given in one call, may come without ids.
        finished: whether the answer ends here.
        """
        if finished and not token_ids and not self.text.num_tokens:
            return self._parser.feed(text) + self._parser.finish()
        events = self._parser.feed_pieces(self.text.split(text, token_ids))
        if finished:
            events += self._parser.feed_pieces(self.text.finish()) + self._parser.finish()
        return events


@dataclass(slots=True)
class CallPiece:
    """A tool call, or the next part of one that has begun."""

    index: int
    call_id: str | None = None
    """None in a piece that continues a call, as is `name`."""
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Pieces:
    """The reasoning, the content and the tool calls that some events brought."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


def pieces(events: Iterable[Event]) -> Pieces:
    """Put the texts of some events together, with one piece for each tool call."""
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
    """Return the parameters' schema of each function that a request declares, by the function's name.

    Tools that are no functions are left out. tools: the engines' objects, those of the chat API (`tool.function.name`)
    or of the Responses API (`tool.name`).
    """
    functions = [getattr(tool, "function", tool) for tool in tools]
    return {
        function.name: getattr(function, "parameters", None) or {}
        for function in functions
        if isinstance(getattr(function, "name", None), str)
    }


def markers_are_ordinary(hf_tokenizer: Any) -> bool:
    """Return whether the tokenizer counts the markers among the ordinary tokens, as the core's does.

    The markers then appear in an answer's text although special tokens are hidden.
    """
    return set(hf_tokenizer.all_special_tokens).isdisjoint(MARKERS)


def name_reasoning_twice(fields: dict[str, Any]) -> None:
    """Write the reasoning among a message's fields under both names of `REASONING_NAMES`, in place."""
    for name in REASONING_NAMES:
        if fields.get(name) is not None:
            fields.update(dict.fromkeys(REASONING_NAMES, fields[name]))
            return


def make_cut_calls_text(message: Any) -> None:
    """Move the arguments of calls that are no JSON object into a chat message's text, and drop those calls, in place.

    Arguments are no object where the token limit cut the call. The Messages API cannot carry them, because a call's
    input is an object there.
    """
    cut = [call for call in message.tool_calls or () if not is_object(call.function.arguments)]
    if cut:
        message.tool_calls = [call for call in message.tool_calls if call not in cut]
        message.content = "\n".join(filter(None, [message.content, *(call.function.arguments for call in cut)]))
