"""Tool calls in SGLang by the core's state machine, under the name of SGLang's own parser for this model.

SGLang's loses a call without arguments, one that the token limit cuts where the answer is not streamed, and half a marker at
the end of a stream.
"""

from __future__ import annotations

from typing import Any

from k26_plugins.common.prompt.output import CallArguments, CallStart, Content, Event, OutputParser
from k26_plugins.sglang import compat, compat_chats

_in_tree = compat.in_tree_tool_detector()


class K26ToolDetector(_in_tree):  # type: ignore[misc, valid-type]
    """Structural tags and the like stay the in-tree class'. SGLang makes one for each answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parser: OutputParser | None = None

    def detect_and_parse(self, text: str, tools: list[Any]) -> Any:
        """A whole answer without its reasoning."""
        parser = _parser(tools)
        normal, calls = _collect(parser.feed(text) + parser.finish())
        return compat_chats.tool_parsing_result(normal, list(calls.values()))

    def parse_streaming_increment(self, new_text: str, tools: list[Any]) -> Any:
        """The next piece of an answer without its reasoning."""
        if self._parser is None:
            self._parser = _parser(tools)
        return self._result(self._parser.feed(new_text))

    def finish(self, tools: list[Any]) -> Any:
        """What was held back at the end of a stream, because a marker might have come of it."""
        return self._result(self._parser.finish() if self._parser is not None else [])

    def _result(self, events: list[Event]) -> Any:
        normal, calls = _collect(events)
        for index, call in calls.items():
            # SGLang reads these two when the answer ends: whether there were calls, and whether all was sent.
            if index == len(self.prev_tool_call_arr):
                self.prev_tool_call_arr.append({"name": call.name, "arguments": ""})
                self.streamed_args_for_tool.append("")
            self.streamed_args_for_tool[index] += call.parameters
            self.prev_tool_call_arr[index]["arguments"] = self.streamed_args_for_tool[index]
        return compat_chats.tool_parsing_result(normal, list(calls.values()))


def _parser(tools: list[Any]) -> OutputParser:
    return OutputParser(
        in_reasoning=False, tools={tool.function.name: tool.function.parameters or {} for tool in tools}
    )


def _collect(events: list[Event]) -> tuple[str, dict[int, Any]]:
    """Text, and one item for each call with what is new of it."""
    normal = ""
    calls: dict[int, Any] = {}
    for event in events:
        match event:
            case Content(text):
                normal += text
            case CallStart(index, _, name):
                calls[index] = compat_chats.tool_call_item(index, name, "")
            case CallArguments(index, text):
                call = calls.setdefault(index, compat_chats.tool_call_item(index, None, ""))
                call.parameters += text
    return normal, calls
