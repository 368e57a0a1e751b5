"""Changes to an engine's registries, made all together or not at all.

A plugin that fails half way would leave an engine with its own tokenizer and our model, or the other way round. So adapters
first look up every name that they need, and note what they are going to change; only then is anything changed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping, Sequence
from types import ModuleType
from typing import Any

from k26_plugins.common.adapters.engine import EngineName
from k26_plugins.common.settings import ENGINE, PARSERS, PROMPTS, STRICT

_ABSENT = object()

Hook = tuple[EngineName, Callable[..., Any], str]
"""A function of the engine's, what goes around it, and what is lost where it is not there."""


def wanted_hooks(requests: Sequence[Hook], answers: Sequence[Hook]) -> list[Hook]:
    """The hooks of an API server's chats, those of requests and those of answers, each unless the user leaves that piece to
    the engine."""
    return [*(requests if PROMPTS.read() != ENGINE else ()), *(answers if PARSERS.read() != ENGINE else ())]


def go_without(error: Exception, lost: str, logger: logging.Logger) -> None:
    """Say that a name of the engine's is not where it was, and what is lost by it. With K26_STRICT=1 the start ends here.

    Raises SystemExit: engines log any other exception of a plugin and go on.
    """
    if STRICT.read():
        raise SystemExit(f"k26-plugins: {error} Without it {lost}, and {STRICT.variable}=1 stops the start.") from error
    logger.warning("k26-plugins: %s Without it %s.", error, lost)


class Registration:
    """Notes changes; `apply` makes them, in order."""

    def __init__(self) -> None:
        self._changes: list[Callable[[], Callable[[], None]]] = []

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, make: Callable[[], object]) -> None:
        """What `make()`, a function of the engine's, puts at `mapping[key]`."""

        def change() -> Callable[[], None]:
            before = mapping.get(key, _ABSENT)
            make()

            def take_back() -> None:
                if before is _ABSENT:
                    mapping.pop(key, None)
                else:
                    mapping[key] = before

            return take_back

        self.call(change)

    def item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """`mapping[key] = value`."""
        self.entry(mapping, key, lambda: mapping.__setitem__(key, value))

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`, of a class or a module."""

        def change() -> Callable[[], None]:
            before = vars(owner).get(name, _ABSENT)
            setattr(owner, name, value)
            return lambda: delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)

        self.call(change)

    def function(self, module: Any, name: str, value: Callable[..., Any]) -> None:
        """`module.name = value`, in its own module and in all that have imported it by name."""
        original = getattr(module, name)

        def change() -> Callable[[], None]:
            _replace(name, original, value)
            return lambda: _replace(name, value, original)

        self.call(change)

    def call(self, change: Callable[[], Callable[[], None]]) -> None:
        """Anything else: `change()` makes it and returns what takes it back."""
        self._changes.append(change)

    def apply(self) -> None:
        """Make the changes. What one of them raises is raised again, after those before it were taken back."""
        undo: list[Callable[[], None]] = []
        try:
            for change in self._changes:
                undo.append(change())
        except BaseException:
            for take_back in reversed(undo):
                take_back()
            raise


def _replace(name: str, old: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)
