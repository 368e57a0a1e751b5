"""Finds the attributes that an engine looks up on the model that it serves, by reading the engine's source.

The tests compare them with the plugin's model class: whatever the engine asks a model for must be there.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

# The names by which the engines' source calls a model or a model's class, and the three ways in which the source takes
# an attribute from it: `model.name`, `getattr(model, "name")` and `hasattr(model, "name")`.
_MODEL = r"\b(?:model|model_class|model_cls|target_model|base_model|_model|get_model\(\))"
_TAKEN = re.compile(rf"""{_MODEL}\.(\w+)|(?:getattr|hasattr)\(\s*[\w.]*?{_MODEL}\s*,\s*["'](\w+)["']""")


def looked_up(package: Path, without: Iterable[str] = ("models",)) -> dict[str, set[str]]:
    """Return every attribute that `package` takes from something called a model, with the files that take it.

    without: the folders of `package` to leave out, because a model's file takes attributes from the model's own parts
    too, and those are no demand of the engine.
    """
    found: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        path = file.relative_to(package).as_posix()
        if not any(path.startswith(f"{folder}/") for folder in without):
            for match in _TAKEN.finditer(file.read_text(encoding="utf-8")):
                found.setdefault(match[1] or match[2], set()).add(path)
    return found


def members(model: type) -> set[str]:
    """Return the attributes that a model class has or sets on `self`, without those that every `nn.Module` has."""
    found = set(dir(model)) - set(dir(nn.Module))
    for its in model.__mro__:
        if its.__module__.startswith(("torch", "typing", "builtins")):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(its)))
        own = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
        found |= {node.attr for node in own if isinstance(node.value, ast.Name) and node.value.id == "self"}
    return found


def differing(model: Any, language_model: Any, names: Iterable[str]) -> list[str]:
    """Return those of `names` that `language_model` has and for which `model` lacks an attribute or has another value.

    A method of `model` itself counts as the same, since it may forward to the language model.
    """
    shared = [name for name in sorted(names) if hasattr(language_model, name)]
    return [name for name in shared if not hasattr(model, name) or not _same(model, language_model, name)]


def _same(model: Any, language_model: Any, name: str) -> bool:
    one, other = getattr(model, name), getattr(language_model, name)
    # A method that the model has itself, as the in-tree wrapper does, may forward to the language model's.
    return one is other or (inspect.ismethod(one) and one.__self__ is model) or bool(one == other)
