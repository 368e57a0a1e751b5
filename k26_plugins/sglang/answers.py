"""Parses the model's answers in SGLang by the core's state machine and their token ids: chats, Messages and Responses.

SGLang 0.5.23 lets an object of a model's own parse answers, and this module provides it. Releases before parse the text
alone, by the class in `output`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from k26_plugins.common.adapters.answers import Answer, name_reasoning_twice, pieces, schemas
from k26_plugins.common.prompt.output import THINK_END, Content, Event, Reasoning
from k26_plugins.common.prompt.thinking import template_options
from k26_plugins.sglang import compat_chats


class K26Answers:
    """An implementation of SGLang's `ChatEncodingOutputAdapter` for one serving object, of chats or of Responses."""

    def __init__(self, serving: Any) -> None:
        self._serving = serving
        self._tokenizer = serving.tokenizer_manager.tokenizer.plain

    def parse_chat_response(
        self, *, request: Any, output_ids: list[int], finish_reason: dict[str, Any]
    ) -> tuple[str | None, str, list[Any] | None, dict[str, Any]]:
        """Return the reasoning, the content, the tool calls and the finish reason of a whole answer."""
        answer = self._of_chat(request)
        reasoning, content, items = answer.whole(output_ids, finish_reason, request.no_stop_trim)
        if items and finish_reason["type"] == "stop":
            finish_reason = {**finish_reason, "type": "tool_calls", "matched": None}
        return reasoning or None, content, self._calls(request, items) or None, finish_reason

    def stream_chat_chunks(
        self,
        *,
        content: dict[str, Any],
        index: int,
        request: Any,
        created: int,
        parser_dict: dict[int, Any],
        has_tool_calls: dict[int, bool],
        choice_logprobs: dict[str, Any] | None,
        finish_reason_type: str | None,
        usage: dict[str, Any] | None,
    ) -> list[str]:
        """Return the server-sent events for the next tokens of one choice.

        parser_dict, has_tool_calls: SGLang's state by the index of the choice, which is updated.
        """
        if index not in parser_dict:
            parser_dict[index] = self._of_chat(request)
        reasoning, text, items = parser_dict[index].next(content, finish_reason_type)
        if items:
            has_tool_calls[index] = True
        chunks = compat_chats.answer_chunks(
            chunk_id=content["meta_info"]["id"],
            created=created,
            model=request.model,
            index=index,
            usage=usage,
            logprobs=choice_logprobs,
            reasoning=reasoning,
            content=text,
            tool_calls=self._calls(request, items),
        )
        return [name_reasoning(chunk) for chunk in chunks] if reasoning else chunks

    def parse_responses_output(
        self,
        *,
        request: Any,
        require_reasoning: bool,
        output_ids: list[int],
        finish_reason: dict[str, Any] | None,
        separate_reasoning: bool,
        parse_tool_calls: bool,
    ) -> tuple[str, str, list[Any]]:
        """Return the reasoning, the content and the tool calls of a whole answer of the Responses API."""
        return self._of_response(request, parse_tool_calls).whole(output_ids, finish_reason or {}, keep_stop=False)

    def new_responses_stream(
        self, *, request: Any, require_reasoning: bool, separate_reasoning: bool, parse_tool_calls: bool
    ) -> _Step:
        """Return the object that parses one streamed answer of the Responses API."""
        return _Step(self._of_response(request, parse_tool_calls))

    def _of_chat(self, request: Any) -> _Answer:
        last = request.messages[-1] if request.messages else None
        continued = request.continue_final_message and getattr(last, "role", None) == "assistant"
        parsing = self._serving._tool_call_parsing_active(request)
        tools = self._serving._effective_tools(request) if parsing else None
        return _Answer(
            self._tokenizer,
            thinking=is_thinking(request) and not continued,
            tools=tools,
            shown=not request.skip_special_tokens,
            separate=request.separate_reasoning,
            wait=not request.stream_reasoning,
        )

    def _of_response(self, request: Any, parse_tool_calls: bool) -> _Answer:
        tools = self._serving._response_tools_to_chat_tools(request) if parse_tool_calls else None
        return _Answer(self._tokenizer, thinking=is_thinking(request), tools=tools)

    def _calls(self, request: Any, items: list[Any]) -> list[Any]:
        """Return SGLang's objects for some calls or pieces of calls.

        The first piece of a call has an id, which SGLang counts over the conversation.
        """
        before = self._serving._get_history_tool_calls_cnt(request)
        return [
            compat_chats.tool_call(item, self._serving._process_tool_call_id(item, before) if item.name else None)
            for item in items
        ]


class _Step:
    """An implementation of SGLang's `ResponsesOutputStream`: the parser of one streamed answer of the Responses API."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    def step(self, chunk: dict[str, Any], finish_reason: dict[str, Any] | None) -> tuple[str, str, list[Any]]:
        """Return the reasoning, the content and the pieces of calls that the next chunk brings."""
        return self._answer.next(chunk, finish_reason["type"] if finish_reason else None)


class _Answer:
    """The parser of one choice of an answer, whole or streamed."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        thinking: bool,
        tools: list[Any] | None,
        shown: bool = False,
        separate: bool = True,
        wait: bool = False,
    ) -> None:
        """Prepare for an answer of which nothing has been read yet.

        shown: whether the text contains special tokens. separate: whether reasoning is given out apart from the
        content. wait: whether reasoning is held back until it is complete.
        """
        self._separate, self._wait, self._waiting = separate, wait, ""
        self._in_reasoning = False
        parsed = schemas(tools) if tools else None
        self._answer = Answer(tokenizer, in_reasoning=thinking, tools=parsed, special_shown=shown)
        self._given_out = 0

    def whole(
        self, output_ids: list[int], finish_reason: dict[str, Any], keep_stop: bool
    ) -> tuple[str, str, list[Any]]:
        """Return the reasoning, the content and the calls of a whole answer.

        The text is cut at the stop token or stop string that ended it, as SGLang cuts a streamed one. keep_stop:
        whether the stop stays in the text.
        """
        matched = finish_reason.get("matched")
        if isinstance(matched, int) and not keep_stop and output_ids and output_ids[-1] == matched:
            output_ids = output_ids[:-1]
        text = self._answer.text.decode(output_ids)
        if isinstance(matched, str) and (found := text.find(matched)) >= 0:
            text = text[: found + (len(matched) if keep_stop else 0)]
        return self._collect(self._answer.feed(text, output_ids, finished=True), finished=True)

    def next(self, chunk: dict[str, Any], finish_reason: str | None) -> tuple[str, str, list[Any]]:
        """Return the reasoning, the content and the pieces of calls that SGLang's next chunk brings."""
        new = compat_chats.new_output_ids(chunk, self._answer.text.num_tokens, finish_reason)
        text, self._given_out = compat_chats.new_text(chunk, self._given_out)
        finished = finish_reason is not None
        return self._collect(self._answer.feed(text, new, finished=finished), finished)

    def _collect(self, events: list[Event], finished: bool) -> tuple[str, str, list[Any]]:
        if not self._separate:
            events = list(self._all_content(events))
        elif events:
            self._in_reasoning = isinstance(events[-1], Reasoning)
        found = pieces(events)
        items = [compat_chats.tool_call_item(call) for call in found.calls]
        if not self._wait:
            return found.reasoning, found.content, items
        self._waiting += found.reasoning
        if self._in_reasoning and not finished:
            return "", found.content, items
        reasoning, self._waiting = self._waiting, ""
        return reasoning, found.content, items

    def _all_content(self, events: list[Event]) -> Iterator[Event]:
        """Yield the events with reasoning turned into content, followed by the marker that ends the think block."""
        for event in events:
            if isinstance(event, Reasoning):
                yield Content(event.text)
            elif self._in_reasoning:
                yield Content(THINK_END)
                yield event
            else:
                yield event
            self._in_reasoning = isinstance(event, Reasoning)


def is_thinking(request: Any) -> bool:
    """Return whether the template opened a think block, as it does unless the request switches thinking off."""
    thinking: bool = template_options(request.chat_template_kwargs).get("thinking", True)
    return thinking


def name_reasoning(event: str) -> str:
    """Return a server-sent event of a chat with its reasoning under both names, `reasoning` and `reasoning_content`."""
    data = json.loads(event.removeprefix("data: "))
    for choice in data["choices"]:
        name_reasoning_twice(choice["delta"])
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
