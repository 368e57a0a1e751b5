"""Tests of what vLLM's API server does to chats beside rendering and parsing, by its own classes without a server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from k26_plugins.common.adapters.engine import EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.vllm import chats, compat, names

pytest.importorskip("vllm.parser.kimi_k2", reason="the hooks were checked where the parser is")


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    chats.install()
    chats.install()


def requests(**fields: Any) -> list[Any]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

    messages = [{"role": "user", "content": "x"}]
    return [
        ChatCompletionRequest(model="m", messages=messages, **fields),
        ResponsesRequest(model="m", input="x", **fields),
        TokenizeChatRequest(model="m", messages=messages, **fields),
    ]


def options(request: Any) -> dict[str, Any]:
    found: dict[str, Any] = request.build_chat_params(None, "auto").chat_template_kwargs
    return found


def test_a_field_thinking_is_heard() -> None:
    for request in requests(thinking={"type": "enabled", "keep": "all"}):
        said = options(request)
        assert (said["thinking"], said["preserve_thinking"]) == (True, True)
    for request in requests(thinking={"type": "disabled"}):
        assert options(request)["thinking"] is False
    for request in requests():
        assert "thinking" not in options(request)


def test_thinking_wins_over_the_effort() -> None:
    chat = requests(chat_template_kwargs={"thinking": False}, reasoning_effort="high")[0]
    assert options(chat)["thinking"] is False
    assert "enable_thinking" not in options(chat)
    assert options(requests(reasoning_effort="none")[0])["thinking"] is False


def test_reasoning_has_both_names() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatMessage

    message = ChatMessage(role="assistant", reasoning="r", content="c").model_dump()
    assert message["reasoning"] == message["reasoning_content"] == "r"
    assert "reasoning_content" not in ChatMessage(role="assistant", content="c").model_dump()


def converted(content: list[dict[str, Any]], role: str = "user") -> list[Any]:
    """Return the chat messages that vLLM makes from a message of the Messages API."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    request = AnthropicMessagesRequest(model="m", max_tokens=5, messages=[{"role": role, "content": content}])
    return AnthropicServingMessages.to_chat_completion_request(request).messages


def test_past_arguments_keep_their_characters() -> None:
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {"city": "上海"}}
    (message,) = converted([use], "assistant")
    (call,) = message["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "上海"}'


@pytest.mark.parametrize(
    ("text", "written"), [("no disk", "Error: no disk"), ("Error: x", "Error: x"), ("", "Error: "), (None, "Error: ")]
)
def test_an_error_is_said(text: Any, written: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": text, "is_error": True}
    assert converted([result])[0]["content"] == written
    assert converted([{**result, "is_error": False}])[0]["content"] == (text or "")


def test_images_of_a_result_stay_in_it() -> None:
    """A tool result's images stay in their places in it, and no user message comes between two results."""
    source = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": "no"}, {"type": "image", "source": source}]
    results: list[dict[str, Any]] = [
        {"type": "tool_result", "tool_use_id": "a", "content": parts, "is_error": True},
        {"type": "tool_result", "tool_use_id": "b", "content": "12:30"},
    ]
    found = [(message["role"], message["content"]) for message in converted(results)]
    assert found == [("tool", [image, {"type": "text", "text": "Error: no"}, image]), ("tool", "12:30")]


def response(arguments: list[str], finish_reason: str) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    calls = [
        {"id": str(place), "type": "function", "function": {"name": "f", "arguments": one}}
        for place, one in enumerate(arguments)
    ]
    message = {"role": "assistant", "content": "said", "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return ChatCompletionResponse.model_validate({"id": "i", "model": "m", "choices": [choice], "usage": usage})


def test_a_message_with_a_cut_call_is_answered() -> None:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    serving = object.__new__(AnthropicServingMessages)
    answer = serving.messages_full_converter(response(['{"a":1}', '{"a":'], "length"))
    assert [(block.type, block.text or block.input) for block in answer.content] == [
        ("text", 'said\n{"a":'),
        ("tool_use", {"a": 1}),
    ]
    assert answer.stop_reason == "max_tokens"
    whole = serving.messages_full_converter(response(["{}"], "tool_calls"))
    assert (whole.stop_reason, len(whole.content)) == ("tool_use", 2)


def test_a_vllm_without_a_place_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """If vLLM has lost the function around which a hook goes, the log names the function."""
    monkeypatch.setattr(names, "RESPONSES_EVENTS", replace(names.RESPONSES_EVENTS, module="vllm.nowhere"))
    chats.install()
    assert "has no vllm.nowhere._convert_stream_to_sse_events" in caplog.text
    nothing = EngineName("vllm.sampling_params", "SamplingParams.nothing", why="test it", remove_when="never")
    with pytest.raises(UnsupportedEngineError):
        compat.wrap(Registration(), nothing, chats.length_wins)
