"""Makes the changes to an engine's registries all together or not at all.

A plugin that fails half way would leave an engine with its own tokenizer and our model, or the other way round. So an
adapter first looks up every name that it needs and notes what it is going to change; only then is anything changed.
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
    """A list of changes to an engine: the other methods note a change, and `apply` makes the changes in that order."""

    def __init__(self) -> None:
        self._changes: list[Callable[[], Callable[[], None]]] = []

    def entry(self, mapping: MutableMapping[Any, Any], key: Any, make: Callable[[], object]) -> None:
        """Note that `make()`, a function of the engine's, is to be called, which sets `mapping[key]`."""

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
        """Note the change `mapping[key] = value`."""
        self.entry(mapping, key, lambda: mapping.__setitem__(key, value))

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Note the change `owner.name = value`. owner: a class or a module."""

        def change() -> Callable[[], None]:
            before = vars(owner).get(name, _ABSENT)
            setattr(owner, name, value)
            return lambda: delattr(owner, name) if before is _ABSENT else setattr(owner, name, before)

        self.call(change)

    def function(self, module: Any, name: str, value: Any) -> None:
        """Note the change `module.name = value`, in `module` and in each module that imported the function by name."""
        original = getattr(module, name)

        def change() -> Callable[[], None]:
            _replace(name, original, value)
            return lambda: _replace(name, value, original)

        self.call(change)

    def wrap(self, owner: Any, name: str, hook: Callable[..., Any], *, everywhere: bool = False) -> None:
        """Note that `hook(original, …)` is to be called in the place of `owner.name`.

        If `hook` is around that function already, nothing is noted. owner: a module that has the function, or a class
        that has the method. If the method is a class method, the `original` that `hook` gets is bound to the class.
        everywhere: whether a module's function is replaced in every module that has imported it by name, and not in
        `owner` alone.
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
        """Note a change of any other kind: `change()` makes it and returns a function that takes it back."""
        self._changes.append(change)

    def apply(self) -> None:
        """Make the changes in order. If one of them raises, take back those before it and raise the exception again."""
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
