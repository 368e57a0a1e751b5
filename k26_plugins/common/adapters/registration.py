"""Changes to an engine's registries, made all together or not at all.

A plugin that fails half way would leave an engine with its own tokenizer and our model, or the other way round. So adapters
first look up every name that they need, and note what they are going to change; only then is anything changed.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

_ABSENT = object()


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

    def function(self, module: Any, name: str, value: Any) -> None:
        """`module.name = value`, in its own module and in all that have imported it by name."""
        original = getattr(module, name)

        def change() -> Callable[[], None]:
            _replace(name, original, value)
            return lambda: _replace(name, value, original)

        self.call(change)

    def wrap(self, owner: Any, name: str, hook: Callable[..., Any], *, everywhere: bool = False) -> None:
        """`hook(original, …)` in the place of `owner.name`, a function of a module or a method of a class; repeatable.

        A class method's `original` has its class already. everywhere: a module's function is replaced in all modules that
        have imported it by name, and not in `owner` alone.
        """
        of_module = isinstance(owner, ModuleType)
        found = getattr(owner, name) if of_module else inspect.getattr_static(owner, name)
        kind = type(found) if isinstance(found, classmethod | staticmethod) else None
        original = found.__func__ if kind else found
        if getattr(original, "k26_hook", None) == hook:
            return

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if kind is classmethod:
                return hook(functools.partial(original, args[0]), *args[1:], **kwargs)
            return hook(original, *args, **kwargs)

        wrapped.k26_hook = hook  # type: ignore[attr-defined]
        change = self.function if everywhere and of_module else self.attribute
        change(owner, name, kind(wrapped) if kind else wrapped)

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
