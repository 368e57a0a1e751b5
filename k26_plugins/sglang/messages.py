"""SGLang's Messages API: what a chat made of a request of it loses, and an answer made of a chat's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from k26_plugins.common.adapters.answers import make_cut_calls_text
from k26_plugins.common.prompt.call_names import is_object
from k26_plugins.common.prompt.chat import as_error


def keep_history(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    """The chat of a request, in which results say that they are errors, and past arguments are spelled as the model wrote
    them: SGLang would spell Chinese by numbers."""
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
    """A cut call's arguments are text: SGLang would make a call without arguments of it."""
    for choice in response.choices[:1]:
        make_cut_calls_text(choice.message)
        choice.message.tool_calls = choice.message.tool_calls or None
    return original(serving, response)


def _told(block: Any) -> Any:
    """A result that is an error, with that in its text. Clients set this again in the next request: it is said once."""
    fields = block.model_dump()
    return type(block).model_validate({**fields, "content": as_error(fields["content"] or "")})
