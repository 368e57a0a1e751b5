"""Give past tool calls ids as the model writes them: `functions.NAME:INDEX`, counted over the conversation.

Clients send other ids: the Responses and Messages APIs create their own, and a conversation may have begun with another
model. In a tool result, only the id names the function, so the model would otherwise read `## Return of call_9f`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def with_kimis_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of messages in which every call has an id of Kimi's form, and every result has its call's id.

    An id of that form is kept, whatever its index, and so is the id of a result without a call. A result without an id
    gets an empty one, because a template cannot write a missing id.
    """
    used = {str(call.get("id")) for message in messages for call in _calls(message)}
    current: dict[str, str] = {}
    count = 0
    changed = []
    for message in messages:
        if calls := _calls(message):
            renamed = []
            for call in calls:
                given = call.get("id")
                name = _name(call)
                if name is not None and not _is_kimis(given, name):
                    index = next(index for index in itertools.count(count) if _id(name, index) not in used)
                    used.add(_id(name, index))
                    call = {**call, "id": _id(name, index)}
                current[str(given)] = str(call.get("id"))
                renamed.append(call)
                count += 1
            message = {**message, "tool_calls": renamed}
        elif message.get("role") == "tool":
            given = message.get("tool_call_id")
            message = {**message, "tool_call_id": "" if given is None else current.get(str(given), given)}
        changed.append(dict(message))
    return changed


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tool calls of a message.

    Return none for calls of another shape, which the engine refuses.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        return []
    return calls


def _name(call: Mapping[str, Any]) -> str | None:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _id(name: str, index: int | str) -> str:
    return f"functions.{name}:{index}"


def _is_kimis(given: Any, name: str) -> bool:
    index = given.removeprefix(_id(name, "")) if isinstance(given, str) else ""
    return index != given and index.isdecimal()
