"""Check an endpoint's tool calls: the ids' format, arguments against their schema, stop reasons, leaked control tokens.

A malformed call is the engine's fault. Whether the model calls the right tool is not checked here: that is what
Kimi-Vendor-Verifier asks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from k26_plugins.operate.verify.endpoint import Endpoint, EndpointError

CALL_ID = re.compile(r"functions\.[\w.\-]+:\d+")
MARKER = re.compile(r"<\|(tool_call|im_)[a-z_]*\|>|</?think>")


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = _tool(
    "get_weather",
    "Weather of a city",
    {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
    ["city"],
)
BOOK = _tool(
    "book-table",
    "Book a table in a restaurant",
    {
        "restaurant": {"type": "string"},
        "guests": {"type": "integer", "minimum": 1},
        "wishes": {"type": "array", "items": {"type": "string"}},
    },
    ["restaurant", "guests"],
)
REQUESTS: tuple[tuple[str, list[dict[str, Any]], Any], ...] = (
    ("What is the weather in Paris, in celsius?", [WEATHER], "auto"),
    ("Compare the weather in Oslo and in Rome.", [WEATHER, BOOK], "auto"),
    ("A table for four at Chez Nous, by the window, please.", [WEATHER, BOOK], "required"),
    ("What is 2 + 2? Answer without tools.", [WEATHER], "auto"),
)


@dataclass(slots=True)
class ToolReport:
    """The faults that were found in the answers to REQUESTS, and how many answers and calls there were."""

    requests: int = 0
    calls: int = 0
    faults: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Requests that the endpoint did not take, each with the endpoint's message."""


def check_tools(
    endpoint: Endpoint, on_request: Callable[[int], None] = lambda done: None, *, max_tokens: int = 256
) -> ToolReport:
    """Send every one of REQUESTS with greedy sampling, once whole and once as a stream, and check the answers.

    on_request: called after each of REQUESTS with the number so far. max_tokens: limit of each answer.
    """
    report = ToolReport()
    for number, (question, tools, choice) in enumerate(REQUESTS, 1):
        messages = [{"role": "user", "content": question}]
        asked = {"tools": tools, "tool_choice": choice, "temperature": 0, "max_tokens": max_tokens}
        for how in ("whole", "streamed"):
            report.requests += 1
            try:
                if how == "whole":
                    answer = endpoint.chat(messages, **asked)["choices"][0]
                else:
                    answer = endpoint.streamed_chat(messages, **asked)
            except EndpointError as error:
                report.refused.append(f"{question!r} with tool_choice {choice}, {how}: {error}")
                continue
            report.calls += len(answer["message"].get("tool_calls") or [])
            report.faults += [f"{question!r}, {how}: {fault}" for fault in faults_of(answer, tools)]
        on_request(number)
    return report


def faults_of(answer: dict[str, Any], tools: list[dict[str, Any]]) -> list[str]:
    """Return a line for each thing that is malformed in one choice of a chat completion.

    answer: the choice, with `message` and `finish_reason`. tools: those that the request offered.
    """
    message, reason = answer["message"], answer.get("finish_reason")
    calls = message.get("tool_calls") or []
    faults = []
    if calls and reason not in ("tool_calls", "length"):
        faults.append(f"it holds {len(calls)} calls and stops for {reason!r}, expected 'tool_calls'")
    if not calls and reason == "tool_calls":
        faults.append("it stops for 'tool_calls' and holds no call")
    for name in ("content", "reasoning", "reasoning_content"):
        leaked = MARKER.search(message.get(name) or "")
        if leaked:
            faults.append(f"{name} holds the control token {leaked.group()}: the engine needs its kimi_k2 parsers")
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for position, call in enumerate(calls):
        # The token limit cuts the last call, so the arguments of that call are not whole.
        cut = reason == "length" and position == len(calls) - 1
        faults += _faults_of_call(call, schemas, cut=cut)
    return faults


def _faults_of_call(call: dict[str, Any], schemas: dict[str, Any], *, cut: bool) -> list[str]:
    faults = []
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if not CALL_ID.fullmatch(str(call.get("id"))):
        faults.append(f"call id {call.get('id')!r} is not functions.NAME:NUMBER, which later turns repeat to the model")
    if name not in schemas:
        return [*faults, f"it calls {name!r}, which was not offered"]
    if cut:
        return faults
    try:
        jsonschema.validate(json.loads(arguments), schemas[name])
    except json.JSONDecodeError as error:
        faults.append(f"arguments of {name} are no JSON ({error}): {arguments[:200]!r}")
    except jsonschema.ValidationError as error:
        faults.append(f"arguments of {name} break their schema: {error.message}")
    return faults
