"""Parses tool calls in SGLang by the core's state machine, under the name of SGLang's own parser for this model.

SGLang's own parser loses a call without arguments, a call that the token limit cuts in an answer that is not streamed,
and half a marker at the end of a stream.
"""

from __future__ import annotations

from typing import Any

from k26_plugins.common.adapters.answers import Pieces, pieces, schemas
from k26_plugins.common.prompt.output import Event, OutputParser
from k26_plugins.sglang import compat, compat_chats

_in_tree = compat.in_tree_tool_detector()


class K26ToolDetector(_in_tree):  # type: ignore[misc, valid-type]
    """The parser of the tool calls of one answer. Structural tags and the like stay the in-tree class's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parser: OutputParser | None = None

    def detect_and_parse(self, text: str, tools: list[Any]) -> Any:
        """Return the text and the tool calls of a whole answer. text: the answer without its reasoning."""
        parser = _parser(tools)
        return _result(pieces(parser.feed(text) + parser.finish()))

    def parse_streaming_increment(self, new_text: str, tools: list[Any]) -> Any:
        """Return the text and the pieces of tool calls that the next piece of an answer gives.

        new_text: the piece, without reasoning.
        """
        if self._parser is None:
            self._parser = _parser(tools)
        return self._result(self._parser.feed(new_text))

    def finish(self, tools: list[Any]) -> Any:
        """Return what was held back because it might have become a marker. SGLang calls this at the end of a stream."""
        return self._result(self._parser.finish() if self._parser is not None else [])

    def _result(self, events: list[Event]) -> Any:
        found = pieces(events)
        for call in found.calls:
            # SGLang reads these two lists at the end of the answer, to see whether there were calls and whether all of
            # their arguments were sent.
            if call.index == len(self.prev_tool_call_arr):
                self.prev_tool_call_arr.append({"name": call.name, "arguments": ""})
                self.streamed_args_for_tool.append("")
            self.streamed_args_for_tool[call.index] += call.arguments
            self.prev_tool_call_arr[call.index]["arguments"] = self.streamed_args_for_tool[call.index]
        return _result(found)


def _parser(tools: list[Any]) -> OutputParser:
    return OutputParser(in_reasoning=False, tools=schemas(tools))


def _result(found: Pieces) -> Any:
    return compat_chats.tool_parsing_result(found.content, [compat_chats.tool_call_item(call) for call in found.calls])
