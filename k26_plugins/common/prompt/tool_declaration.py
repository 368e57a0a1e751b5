"""Declare tools as the model was trained to see them: as a TypeScript-like namespace of functions (docs/model.md, 5.2).

A tool's JSON Schema is read once, top down; each function here returns the text of one part of it. `indent` is the
white space before the line on which the part begins.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from k26_plugins.common.prompt.control_tokens import require_shallow

logger = logging.getLogger(__name__)

Schema: TypeAlias = Mapping[str, Any]

_STEP = "  "
# The limits that the comment of a value of each type lists, in this order.
_LIMITS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION_MEMBERS = {
    "string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null",
    "object": "{}", "array": "Array<any>",
}  # fmt: skip
_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "number": (int, float), "integer": int, "boolean": bool,
}  # fmt: skip


class DeclarationError(ValueError):
    """A JSON Schema that cannot be expressed in TypeScript. The message names the part."""


@dataclass
class _Definitions:
    """The `$defs` found so far, and whether the parameters refer to themselves."""

    schemas: dict[str, Any] = field(default_factory=dict)
    refers_to_itself: bool = False


def sorted_deep(value: Any, depth: int = 0) -> Any:
    """Return a copy of JSON data with the keys of every object sorted.

    The prompt then does not depend on the order in which a client sends them. Raises ValueError for data nested deeper
    than MAX_DEPTH.
    """
    require_shallow(depth)
    if isinstance(value, Mapping):
        return {key: sorted_deep(value[key], depth + 1) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [sorted_deep(item, depth + 1) for item in value]
    return value


def declare_tools(tools: Sequence[Schema]) -> str | None:
    """Return the declaration of OpenAI-style tools whose keys are sorted; it is empty if none of them is a function.

    Return None, and log a warning, if a schema cannot be expressed in TypeScript. The chat template then writes all
    tools as JSON, as the published tokenizer does.

    Examples:
        >>> parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        >>> function = {"name": "get_weather", "description": "Current weather.", "parameters": parameters}
        >>> print(declare_tools([{"type": "function", "function": function}]))
        # Tools
        <BLANKLINE>
        ## functions
        namespace functions {
        // Current weather.
        type get_weather = (_: {
          city: string
        }) => any;
        }
        <BLANKLINE>
    """
    try:
        functions = [
            _function(tool["function"]) for tool in tools if tool.get("type") == "function" and tool.get("function")
        ]
    except (DeclarationError, AttributeError, KeyError, TypeError, RecursionError) as error:
        logger.warning("the tools are shown to the model as JSON, for one has no TypeScript form: %r", error)
        return None
    if not functions:
        return ""
    body = "\n".join(functions)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{body}\n}}\n"


def _function(function: Schema) -> str:
    definitions = _Definitions()
    parameters = function.get("parameters") or {}
    root = _object(parameters, "", definitions)
    lines = []
    if definitions.refers_to_itself:
        properties = [text for _, _, text in _properties(parameters, _STEP, definitions)]
        lines.append("interface parameters {" + _wrapped(properties, "") + "}")
        root = "parameters"
    for name, schema in list(definitions.schemas.items()):
        described = _comment(schema.get("description") or "", "")
        lines.append(f"{described}interface {name} {_type(schema, '', definitions)}")
    if function.get("description"):
        lines.append(_comment(function["description"], "").removesuffix("\n"))
    lines.append(f"type {function.get('name', 'function')} = (_: {root}) => any;")
    return "\n".join(lines)


def _type(schema: Any, indent: str, definitions: _Definitions) -> str:
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if "$ref" in schema:
        return _reference(schema["$ref"], definitions)
    if "anyOf" in schema:
        return " | ".join(_type(option, indent, definitions) for option in schema["anyOf"])
    if "enum" in schema:
        return _enum(schema)
    if schema == {}:
        return "any"
    if "type" not in schema:
        raise DeclarationError(f"a schema has neither type, enum, anyOf nor $ref: {schema}")
    kind = schema["type"]
    if isinstance(kind, list):
        return " | ".join(_UNION_MEMBERS[member] for member in kind)
    if kind == "object":
        return _object(schema, indent, definitions)
    if kind == "array":
        return _array(schema, indent, definitions)
    if not isinstance(kind, str):
        raise DeclarationError(f"a schema has the type {kind!r}")
    return "number" if kind == "integer" else kind


def _object(schema: Schema, indent: str, definitions: _Definitions) -> str:
    if not schema:
        return "{}"
    definitions.schemas.update(schema.get("$defs") or {})
    inner = indent + _STEP
    extra = _additional(schema.get("additionalProperties"), inner, definitions)
    properties = _properties(schema, inner, definitions)
    entries = [text for _, _, text in sorted(properties, key=lambda entry: entry[:2])]
    if extra is not None:
        entries.append(f"{inner}[k: string]: {extra}")
    return "{" + _wrapped(entries, indent) + "}" if entries else "{}"


def _wrapped(entries: list[str], indent: str) -> str:
    return "\n" + ",\n".join(entries) + "\n" + indent if entries else ""


def _additional(value: Any, indent: str, definitions: _Definitions) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "any" if value else "never"
    if isinstance(value, Mapping):
        return _type(value, indent, definitions)
    raise DeclarationError(f"additionalProperties is {value!r}, expected a boolean or a schema")


def _properties(schema: Schema, indent: str, definitions: _Definitions) -> list[tuple[bool, str, str]]:
    """Return (optional, name, text) for each property, in the schema's order."""
    required = set(schema.get("required", ()))
    entries = []
    for name, content in schema.get("properties", {}).items():
        optional = name not in required
        kind = _type(content, indent, definitions)
        text = _notes(content, indent) + _default(content, indent) + f"{indent}{name}{'?' if optional else ''}: {kind}"
        entries.append((optional, name, text))
    return entries


def _array(schema: Schema, indent: str, definitions: _Definitions) -> str:
    item = schema.get("items") or {}
    inner = indent + _STEP
    notes = _notes(item, inner)
    if not notes:
        return f"Array<{_type(item, indent, definitions)}>"
    return f"Array<\n{notes}{inner}{_type(item, inner, definitions)}\n{indent}>"


def _enum(schema: Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        named = [member for member in kind if member != "null"]
        if len(kind) not in (1, 2) or len(named) > 1:
            raise DeclarationError(f"an enum has the types {kind}, expected one, or one and null")
        kind = named[0] if named else "null"
    expected = _PYTHON_TYPES.get(kind) if isinstance(kind, str) else None
    for value in schema["enum"]:
        if value is not None and expected is not None and not isinstance(value, expected):
            raise DeclarationError(f"an enum of type {kind} holds {value!r}")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])


def _reference(target: str, definitions: _Definitions) -> str:
    if target == "#":
        definitions.refers_to_itself = True
        return "parameters"
    name = target.split("/")[-1]
    if not target.startswith("#/$defs/") or not isinstance(definitions.schemas.get(name), Mapping):
        raise DeclarationError(f"$ref {target!r} points to no definition")
    return name


def _notes(schema: Any, indent: str) -> str:
    """Return a value's description and limits as comment lines."""
    if isinstance(schema, bool):
        return ""
    notes = _comment(schema.get("description") or "", indent)
    if any(name in schema for name in ("$ref", "anyOf", "enum")) or not isinstance(schema.get("type"), str):
        return notes
    limits = [f"{name}: {schema[name]}" for name in _LIMITS.get(schema["type"], ()) if name in schema]
    return notes + (f"{indent}// {', '.join(limits)}\n" if limits else "")


def _comment(text: str, indent: str) -> str:
    return "".join((f"{indent}// {line}" if line else "") + "\n" for line in text.split("\n")) if text else ""


def _default(schema: Any, indent: str) -> str:
    value = schema.get("default") if isinstance(schema, Mapping) else None
    if value is None:
        return ""
    shown = repr(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)
    return f"{indent}// Default: {shown}\n"
