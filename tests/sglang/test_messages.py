"""Tests of SGLang's Messages API through its own classes, without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from k26_plugins.sglang.messages import keep_history, show_cut_calls
from k26_plugins.sglang.serving import keep_reasoning_apart

protocol = pytest.importorskip("sglang.srt.entrypoints.anthropic.protocol")
AnthropicServing = pytest.importorskip("sglang.srt.entrypoints.anthropic.serving").AnthropicServing


@pytest.fixture
def serving() -> Any:
    return AnthropicServing(SimpleNamespace(supports_inline_system=True))


def converted(serving: Any, blocks: list[dict[str, Any]], role: str = "user") -> Any:
    messages = [{"role": role, "content": blocks}]
    request = protocol.AnthropicMessagesRequest(model="m", max_tokens=5, messages=messages)
    return keep_history(AnthropicServing._convert_to_chat_completion_request, serving, request).messages


def test_past_arguments_keep_their_characters(serving: Any) -> None:
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {"city": "上海"}}
    (call,) = converted(serving, [use], "assistant")[0].tool_calls
    assert call.function.arguments == '{"city": "上海"}'


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("no disk", "Error: no disk"),
        ("Error: x", "Error: x"),
        (None, "Error: "),
        ([{"type": "text", "text": "no disk"}], "Error: no disk"),
        ([], "Error: "),
    ],
)
def test_an_error_is_said(serving: Any, content: Any, written: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": content, "is_error": True}
    (message,) = converted(serving, [result])
    assert message.content == written
    assert "Error:" not in str(converted(serving, [{**result, "content": "x", "is_error": False}])[0].content)


@pytest.mark.parametrize(("template", "apart"), [(None, True), ("the user's", False)])
def test_past_reasoning_goes_where_the_template_writes_it(template: str | None, apart: bool) -> None:
    manager = SimpleNamespace(chat_template_name=template)
    assert keep_reasoning_apart(lambda serving: False, SimpleNamespace(template_manager=manager)) is apart


def test_a_message_with_a_cut_call_is_answered(serving: Any) -> None:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionResponse

    calls = [
        {"id": str(place), "type": "function", "function": {"name": "f", "arguments": one}}
        for place, one in enumerate(['{"a":1}', '{"a":'])
    ]
    choice = {"index": 0, "message": {"role": "assistant", "tool_calls": calls}, "finish_reason": "length"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    response = ChatCompletionResponse.model_validate({"id": "i", "model": "m", "choices": [choice], "usage": usage})
    answer = show_cut_calls(AnthropicServing._convert_response, serving, response)
    assert [getattr(block, "text", None) or block.input for block in answer.content] == ['{"a":', {"a": 1}]
    assert answer.stop_reason == "max_tokens"
