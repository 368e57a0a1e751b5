"""Tests of tools in their TypeScript form, against what the published encoder wrote for the same tools.

The expected texts come from the encoder that the hub's tokenizer ships (`tool_declaration_ts.py`, as redistributed in
thinking-machines-lab/tinker-cookbook), run once on these tools.
"""

from __future__ import annotations

from typing import Any

import pytest

from k26_plugins.common.prompt.chat import render
from k26_plugins.common.prompt.tool_declaration import declare_tools, sorted_deep


def tool(name: str, parameters: Any, description: str | None = None) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters}
    return {"type": "function", "function": function | ({"description": description} if description else {})}


SEARCH = tool(
    "search.web-v2",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for.\n\nAny language.", "minLength": 1},
            "limit": {"type": "integer", "minimum": 1, "maximum": 50, "default": 10},
            "exact": {"type": "boolean", "default": False},
            "sites": {"type": "array", "items": {"type": "string", "description": "A host", "pattern": "^[a-z.]+$"}},
            "order": {"enum": ["new", "old", 3, None], "description": "How to sort"},
            "extra": {"type": ["string", "null", "object"]},
            "filter": {
                "type": "object",
                "properties": {"b": {"anyOf": [{"type": "string"}, {"type": "number"}]}, "a": {}},
                "required": ["b"],
                "additionalProperties": False,
            },
        },
        "required": ["query", "filter"],
    },
    "Searches the web.\nSlow.",
)
TREE = tool(
    "tree",
    {
        "type": "object",
        "$defs": {
            "Node": {
                "type": "object",
                "description": "A node",
                "properties": {"next": {"$ref": "#/$defs/Node"}, "value": {"type": "number"}},
                "required": ["value"],
            }
        },
        "properties": {"root": {"$ref": "#/$defs/Node"}, "tags": {"type": "array"}},
        "additionalProperties": {"type": "integer"},
    },
)
ITSELF = tool("again", {"type": "object", "properties": {"child": {"$ref": "#"}, "a": {"type": "string"}}})
EXPECTED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "search": (
        [SEARCH],
        """\
# Tools

## functions
namespace functions {
// Searches the web.
// Slow.
type search.web-v2 = (_: {
  filter: {
    b: string | number,
    a?: any,
    [k: string]: never
  },
  // What to look for.

  // Any language.
  // minLength: 1
  query: string,
  // Default: False
  exact?: boolean,
  extra?: string | null | {},
  // maximum: 50, minimum: 1
  // Default: 10
  limit?: number,
  // How to sort
  order?: "new" | "old" | 3 | None,
  sites?: Array<
    // A host
    // pattern: ^[a-z.]+$
    string
  >
}) => any;
}
""",
    ),
    "tree": (
        [TREE],
        """\
# Tools

## functions
namespace functions {
// A node
interface Node {
  value: number,
  next?: Node
}
type tree = (_: {
  root?: Node,
  tags?: Array<any>,
  [k: string]: number
}) => any;
}
""",
    ),
    "itself": (
        [ITSELF],
        """\
# Tools

## functions
namespace functions {
interface parameters {
  a?: string,
  child?: parameters
}
type again = (_: parameters) => any;
}
""",
    ),
    "several": (
        [tool("noargs", {}), tool("b", None, "B"), {"type": "_plugin"}],
        """\
# Tools

## functions
namespace functions {
type noargs = (_: {}) => any;
// B
type b = (_: {}) => any;
}
""",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_as_the_published_encoder(name: str) -> None:
    tools, expected = EXPECTED[name]
    assert declare_tools(sorted_deep(tools)) == expected


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"$ref": "#/definitions/A"}}},
        {"type": "object", "properties": {"a": {"title": "no type"}}},
        {"type": "object", "properties": {"a": {"type": "integer", "enum": ["x"]}}},
        {"type": "object", "properties": {"a": {"type": ["string", "date"]}}},
        {"type": "object", "properties": [1]},
        {"type": "object", "additionalProperties": "yes"},
    ],
    ids=["foreign-ref", "no-type", "wrong-enum", "unknown-member", "list", "string"],
)
def test_what_has_no_typescript_form_is_written_as_json(parameters: Any) -> None:
    """If a tool has no TypeScript form, all tools are written as JSON with sorted keys, as by the published
    tokenizer."""
    text = render([{"role": "user", "content": "Hi"}], tools=[tool("f", parameters)])
    assert declare_tools(sorted_deep([tool("f", parameters)])) is None
    assert text.startswith('<|im_system|>tool_declare<|im_middle|>[{"function":{"name":"f","parameters":{')


def test_a_schema_as_deep_as_memory_is_no_crash() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    assert declare_tools([tool("f", {"type": "object", "properties": {"a": deep}})]) is None


def test_what_engines_fill_in_is_not_shown() -> None:
    filled = {**SEARCH, "function": {**SEARCH["function"], "strict": False, "returns": None}}
    message = [{"role": "user", "content": "Hi"}]
    assert render(message, tools=[filled]) == render(message, tools=[SEARCH])
