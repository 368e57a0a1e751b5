"""Define the swarm's tools, with JSON schemas such as agent frameworks send, and compute their results.

The results need no outside data: they follow from the arguments by arithmetic and seeded random numbers.
"""

from __future__ import annotations

import json
import math
import random
from typing import Any

import jsonschema

LATENCY_SPREAD = 0.5
"""The standard deviation of the logarithm of a tool's latency."""


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: list[dict[str, Any]] = [
    _tool(
        "search",
        "Search the records",
        {"query": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": 50}},
        ["query"],
    ),
    _tool(
        "read_record",
        "Read one record",
        {"number": {"type": "integer"}, "part": {"type": "string", "enum": ["head", "body", "all"]}},
        ["number"],
    ),
    _tool(
        "compute",
        "Sum or mean of numbers",
        {
            "operation": {"type": "string", "enum": ["sum", "mean"]},
            "values": {"type": "array", "items": {"type": "number"}},
        },
        ["operation", "values"],
    ),
    _tool(
        "write_note",
        "Keep a note for the report",
        {
            "title": {"type": "string"},
            "source": {
                "type": "object",
                "properties": {"record": {"type": "integer"}, "certain": {"type": "boolean"}},
                "required": ["record"],
            },
        },
        ["title", "source"],
    ),
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def scripted_arguments(name: str, rng: random.Random) -> dict[str, Any]:
    """Return random arguments for the tool `name`, for a call that the script makes in place of the model."""
    number = rng.randrange(10_000)
    arguments: dict[str, dict[str, Any]] = {
        "search": {"query": f"station {number}", "limit": rng.randint(1, 50)},
        "read_record": {"number": number, "part": rng.choice(["head", "body", "all"])},
        "compute": {"operation": rng.choice(["sum", "mean"]), "values": [rng.randrange(100) for _ in range(4)]},
        "write_note": {"title": f"note {number}", "source": {"record": number, "certain": rng.random() < 0.5}},
    }
    return arguments[name]


def fault_of(name: str, arguments: str) -> str | None:
    """Return why the model's call of the tool `name` cannot be carried out, or None if it can."""
    if name not in SCHEMAS:
        return f"there is no tool {name!r}"
    try:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    except (json.JSONDecodeError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def answer(name: str, arguments: str) -> str:
    """Return the tool's result as JSON; the same call always gets the same result.

    The arguments must be valid (`fault_of`).
    """
    given = json.loads(arguments)
    if name == "compute":
        values = given["values"] or [0]
        return json.dumps({"result": math.fsum(values) / (len(values) if given["operation"] == "mean" else 1)})
    rng = random.Random(f"{name} {arguments}")
    if name == "search":
        return json.dumps({"records": [rng.randrange(10_000) for _ in range(min(given.get("limit", 5), 8))]})
    if name == "read_record":
        return json.dumps({"record": given["number"], "level_cm": rng.randrange(900), "valid": rng.random() < 0.9})
    return json.dumps({"kept": True})


def latency(mean: float, rng: random.Random) -> float:
    """Return the random seconds that a tool takes, log-normal with this mean, as for tools behind a network."""
    return mean and mean * rng.lognormvariate(-(LATENCY_SPREAD**2) / 2, LATENCY_SPREAD)


def call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call in the form in which an assistant's message holds it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
