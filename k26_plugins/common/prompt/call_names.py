"""Determine a call's tool and id, also where the model did not write `functions.NAME:INDEX`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

# Names may contain dots, hyphens and colons; the last colon separates the index.
_KIMIS_ID = re.compile(r"(?:functions\.)?(?P<name>\S+):(?P<index>\d+)")

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each declared tool's parameters, by the tool's name."""


def tool_name(header: str, tools: Tools) -> str | None:
    """Return the tool that a call's header names, or None.

    The header is `functions.NAME:INDEX` or `NAME:INDEX` with any name, or `functions.NAME` or `NAME` with a declared
    name.
    """
    found = _KIMIS_ID.fullmatch(header)
    named = found["name"] if found else None
    bare = header.removeprefix("functions.")
    if named not in tools and bare in tools:
        return bare
    return named


def tool_by_arguments(arguments: str, tools: Tools) -> str | None:
    """Return the only declared tool that accepts these arguments, or None if no tool or several tools do.

    arguments: JSON as the model wrote it. A tool accepts them if all required parameters and only known ones are given.
    """
    try:
        passed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return None
    if not isinstance(passed, dict):
        return None
    fitting = [name for name, schema in tools.items() if _takes(schema, set(passed))]
    return fitting[0] if len(fitting) == 1 else None


def is_object(arguments: str) -> bool:
    """Return whether a call's arguments are a JSON object, the only form that every API accepts."""
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


class CallIds:
    """The ids of one answer's calls, all different."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def take(self, header: str, name: str) -> str:
        """Return the id of the answer's next call.

        The id is what the model wrote, if that has Kimi's form and is free, else `functions.NAME:INDEX` with the next
        free index.
        """
        found = _KIMIS_ID.fullmatch(header)
        written = header if found and found["name"] == name else None
        index = found["index"] if found and written else header if header.isdecimal() else len(self._used)
        numbered = (f"functions.{name}:{number}" for number in itertools.count(int(index)))
        chosen = next(one for one in itertools.chain([written] if written else [], numbered) if one not in self._used)
        self._used.add(chosen)
        return chosen


def _takes(schema: Mapping[str, Any], passed: set[str]) -> bool:
    known, required = schema.get("properties"), schema.get("required")
    names = set(known) if isinstance(known, Mapping) else set()
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    return needed <= passed <= names
