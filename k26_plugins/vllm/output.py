"""Parses the model's answers in vLLM, streamed or not, by the core's state machine.

vLLM composes a parser of answers from a reasoning parser and a tool-call parser. Its own parsers for this model read a
whole answer's text, in which a marker that the model quotes looks like a marker that it means. If both parsers are
`k26`, or one is and the other is left out, `K26Parser` takes the place of the composed parser; it reads the token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.parser.abstract_parser import DelegatingParser, DeltaMessage, FunctionCall
from vllm.parser.kimi_k2 import DeltaFunctionCall, DeltaToolCall
from vllm.parser.metrics import record_tool_parser_invocation
from vllm.reasoning.kimi_k2_reasoning_parser import KimiK2ReasoningParser
from vllm.tool_parsers.kimi_k2_tool_parser import KimiK2ToolParser

from k26_plugins.common.adapters.answers import (
    REASONING_NAMES,
    Answer,
    CallPiece,
    markers_are_ordinary,
    pieces,
    schemas,
)
from k26_plugins.common.prompt.call_names import Tools
from k26_plugins.common.prompt.output import CALL_BEGIN, SECTION_BEGIN, THINK_END, Event, Reasoning
from k26_plugins.common.prompt.thinking import begins_in_reasoning, template_options
from k26_plugins.vllm import compat


class K26ToolParser(KimiK2ToolParser):
    """The tool-call parser `k26`.

    It parses answers only beside a reasoning parser that is not `k26`; otherwise `K26Parser` does, and takes the
    structural tags of grammars from this class.
    """

    def adjust_request(self, request: Any) -> Any:
        """Return the request, with special tokens shown only if the tokenizer does not count the markers as ordinary."""
        # vLLM's parser would have special tokens shown. That is not needed if the tokenizer counts the markers as
        # ordinary.
        return request if markers_are_ordinary(self.model_tokenizer) else super().adjust_request(request)


class K26ReasoningParser(KimiK2ReasoningParser):
    """The reasoning parser `k26`.

    It parses answers only beside a tool-call parser that is not `k26`; otherwise `K26Parser` does. vLLM also uses it in
    the process of the engine core.
    """

    def adjust_request(self, request: Any) -> Any:
        """Return the request, with special tokens shown only if the tokenizer does not count the markers as ordinary."""
        return request if markers_are_ordinary(self.model_tokenizer) else super().adjust_request(request)


class K26Parser(DelegatingParser):
    """The parser of one answer, whole or streamed, for both reasoning and tool calls."""

    tool_strict_level: Any

    def __init__(self, tokenizer: Any, tools: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, tools, *args, **kwargs)
        options = template_options(kwargs.get("chat_template_kwargs"))
        self._in_reasoning = self.reasoning_parser_cls is not None and options.get("thinking", True)
        self._prompt_seen = False
        self._answer: Answer | None = None

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        """Decide from the end of the prompt whether the answer begins with reasoning, whatever the request says."""
        self._prompt_seen = True
        if self.reasoning_parser_cls is not None:
            self._in_reasoning = begins_in_reasoning(self.model_tokenizer.plain, prompt_token_ids)

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[FunctionCall] | None]:
        """Return the reasoning, the content and the tool calls of a whole answer."""
        delta = self._message(self._feed(model_output, model_output_token_ids, request, finished=True))
        calls = [
            FunctionCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in delta.tool_calls
        ]
        self._count(bool(calls), request, is_streaming=False)
        return delta.reasoning, delta.content, calls

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        """Return the streaming delta that the next tokens give, or None if they give nothing to send yet."""
        if not self._prompt_seen and prompt_token_ids is not None:
            self.set_prompt_token_ids(prompt_token_ids)
        events = self._feed(delta_text, delta_token_ids, request, finished)
        if not getattr(request, "include_reasoning", True):
            events = [event for event in events if not isinstance(event, Reasoning)]
        delta = self._message(events)
        self._count(bool(delta.tool_calls), request, is_streaming=True)
        return delta if events else None

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Return the number of tokens in front of the first marker that ends the think block."""
        if not self._in_reasoning:
            return 0
        ends = {self.model_tokenizer.plain.special[name] for name in (THINK_END, SECTION_BEGIN, CALL_BEGIN)}
        return next((place for place, token_id in enumerate(token_ids) if token_id in ends), len(token_ids))

    def _apply_structural_tag(self, request: Any) -> Any:
        """Make the grammar of an answer's schema allow tool calls too; by default vLLM's allows those of strict
        tools."""
        if hasattr(self, "tool_strict_level") and request.extract_structured_outputs() is not None:
            self.tool_strict_level = compat.level_of_calls(self.tool_strict_level)
        return super()._apply_structural_tag(request)

    def _feed(self, text: str, token_ids: Sequence[int], request: Any, finished: bool) -> list[Event]:
        if self._answer is None:
            self._answer = Answer(
                self.model_tokenizer.plain,
                in_reasoning=self._in_reasoning,
                tools=self._tools(request),
                special_shown=request.skip_special_tokens is False,
            )
        return self._answer.feed(text, token_ids, finished=finished)

    def _tools(self, request: Any) -> Tools | None:
        """Return the schemas of the request's tools, or None if the request allows no calls.

        With None the parser drops calls that the model writes nevertheless, as vLLM does, instead of showing them as
        text.
        """
        if self.tool_parser_cls is None or not request.tools or request.tool_choice == "none":
            return None
        return schemas(request.tools)

    def _message(self, events: list[Event]) -> DeltaMessage:
        found = pieces(events)
        message: dict[str, Any] = dict.fromkeys(REASONING_NAMES, found.reasoning) if found.reasoning else {}
        if found.content:
            message["content"] = found.content
        if found.calls:
            message["tool_calls"] = [_call(piece) for piece in found.calls]
        return DeltaMessage(**message)

    def _count(self, called: bool, request: Any, *, is_streaming: bool) -> None:
        if self.tool_parser_cls is not None:
            record_tool_parser_invocation(is_tool_called=called, is_streaming=is_streaming, request=request)


def compose(composed: type, reasoning_parser: type | None, tool_parser: type | None) -> type:
    """Return the class that takes the place of the parser that vLLM composed from the parsers `k26`.

    It keeps the level of `--tool-strict-level`. reasoning_parser, tool_parser: the parsers' classes, None where the
    command line leaves one out.
    """
    chosen = {"reasoning_parser_cls": reasoning_parser, "tool_parser_cls": tool_parser}
    if hasattr(composed, "tool_strict_level"):
        chosen["tool_strict_level"] = composed.tool_strict_level
    return type("K26Parser", (K26Parser,), chosen)


def _call(piece: CallPiece) -> DeltaToolCall:
    """Return vLLM's object for a piece of a tool call.

    vLLM sends the fields that are set, so a piece that continues a call gets its index and arguments only.
    """
    if piece.name is None:
        return DeltaToolCall(index=piece.index, function=DeltaFunctionCall(arguments=piece.arguments))
    function = DeltaFunctionCall(name=piece.name, arguments=piece.arguments)
    return DeltaToolCall(index=piece.index, id=piece.call_id, type="function", function=function)
