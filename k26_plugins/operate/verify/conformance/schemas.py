"""Cases about calls of tools whose schemas use many features of JSON Schema, whole and streamed.

The arguments of a call must conform to the tool's schema.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from k26_plugins.operate.verify.conformance.case import Case, Chat, NotAskedError, require
from k26_plugins.operate.verify.tools import faults_of

POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}
# A name, what the model is asked, and the schema of the tool's parameters.
SCHEMAS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("nothing", "Ping the server.", {"type": "object", "properties": {}}),
    (
        "enum",
        "Turn the lamp green.",
        {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]},
    ),
    (
        "range",
        "Set the volume to 7.",
        {
            "type": "object",
            "properties": {"level": {"type": "integer", "minimum": 0, "maximum": 10}},
            "required": ["level"],
            "additionalProperties": False,
        },
    ),
    (
        "nested",
        "Draw a line from (0, 1) to (2, 3).",
        {
            "type": "object",
            "properties": {"points": {"type": "array", "items": POINT, "minItems": 2, "maxItems": 2}},
            "required": ["points"],
        },
    ),
    (
        "defs",
        "Mark the point (4, 5).",
        {
            "type": "object",
            "properties": {"at": {"$ref": "#/$defs/point"}},
            "required": ["at"],
            "$defs": {"point": POINT},
        },
    ),
    (
        "anyOf",
        "Look up the order number 12.",
        {
            "type": "object",
            "properties": {"order": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
            "required": ["order"],
        },
    ),
)


def _ask(chat: Chat, question: str, tool: dict[str, Any], *, streamed: bool) -> str:
    body = {"tools": [tool], "tool_choice": "required", "temperature": 0, "max_tokens": chat.max_tokens}
    choice = chat.streamed(question, **body) if streamed else chat.ask(question, **body)["choices"][0]
    if choice["finish_reason"] == "length":
        raise NotAskedError(f"the answer did not end within {chat.max_tokens} tokens")
    faults = faults_of(choice, [tool])
    require(not faults, "; ".join(faults))
    calls = choice["message"].get("tool_calls") or []
    require(bool(calls), "no call, and one is required")
    return str(calls[0]["function"]["arguments"])


def cases() -> list[Case]:
    """Return the cases about tool calls."""
    found = []
    for name, question, schema in SCHEMAS:
        tool = {"type": "function", "function": {"name": f"use_{name}", "description": question, "parameters": schema}}
        for how in ("whole", "streamed"):
            ask = partial(_ask, question=question, tool=tool, streamed=how == "streamed")
            found.append(Case(f"tool schema with {name}, {how}", ask))
    return found
