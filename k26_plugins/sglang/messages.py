"""Keeps what SGLang's Messages API loses where it turns a request into a chat, and a chat's answer into its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from k26_plugins.common.adapters.answers import make_cut_calls_text
from k26_plugins.common.prompt.call_names import is_object
from k26_plugins.common.prompt.chat import as_error


def keep_history(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    """Wrap SGLang's `_convert_to_chat_completion_request` so that the chat keeps errors and the characters of
    arguments.

    A tool's result with `is_error` says so in its text, where SGLang would drop the field. The arguments of past calls
    stay as the model wrote them, where SGLang would write Chinese characters as escape sequences.
    """
    for message in request.messages:
        if isinstance(message.content, list):
            message.content = [_told(block) if getattr(block, "is_error", None) else block for block in message.content]
    chat = original(serving, request)
    for message in chat.messages:
        for call in getattr(message, "tool_calls", None) or ():
            if is_object(call.function.arguments):
                call.function.arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
    return chat


def show_cut_calls(original: Callable[..., Any], serving: Any, response: Any) -> Any:
    """Wrap SGLang's `_convert_response` so that a call which the token limit cut becomes text.

    SGLang would turn it into a call without arguments, because the arguments of such a call are no JSON.
    """
    for choice in response.choices[:1]:
        make_cut_calls_text(choice.message)
        choice.message.tool_calls = choice.message.tool_calls or None
    return original(serving, response)


def _told(block: Any) -> Any:
    """Return a copy of a tool's result that says in its text that it is an error.

    Clients send the same result again in the next request; its text does not get the word twice.
    """
    fields = block.model_dump()
    return type(block).model_validate({**fields, "content": as_error(fields["content"] or "")})
