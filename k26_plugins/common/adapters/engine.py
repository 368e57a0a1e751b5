"""The engine that an adapter is for: which release is installed, its private names or one clear error, hooks around them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from k26_plugins.common.adapters.registration import Registration


class UnsupportedEngineError(RuntimeError):
    """An engine in which something that an adapter needs is not where it was."""


@dataclass(frozen=True)
class EngineName:
    """A name of an engine's that an adapter touches and that the engine does not promise to keep.

    Each adapter has its names in one table, `names.py`: what it looks up, patches, imports or derives from, and every
    attribute with an underscore. What else it takes from an object that it found (a registry's method, say) goes with the
    object's entry. Making one imports nothing.
    """

    module: str
    path: str
    """Where it is in the module: `Class.method` for a method, empty for the module itself."""
    why: str
    """What the adapter does with it, as the end of "which k26-plugins needs to …"."""
    remove_when: str
    """What has to be so before the entry can go, besides the end of the piece of the adapter that needs it."""
    since: str = ""
    """The first checked release that has it; empty where the first of all does."""
    until: str = ""
    """The last checked release that has it; empty where the last of all does."""

    def __str__(self) -> str:
        return f"{self.module}.{self.path}" if self.path else self.module

    @property
    def owner(self) -> EngineName:
        """What holds it and is changed where it is patched: the class of a method, the module of anything else."""
        return replace(self, path=self.path.rpartition(".")[0])

    @property
    def attribute(self) -> str:
        """What it is called there."""
        return self.path.rpartition(".")[2]

    def look_up(self) -> Any:
        """The thing itself. Raises ImportError or AttributeError."""
        found: Any = importlib.import_module(self.module)
        for part in self.path.split(".") if self.path else ():
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Engine:
    """An engine by its distributions."""

    checked: Mapping[str, str]
    """The releases that were checked, by the distribution's name, in the order in which distributions are looked
    for."""
    without: str
    """What else a user can do, as the end of "Install one of these, or …"."""
    title: str = ""
    """What users call it, if that is not the distribution's name."""
    wraps_everywhere: bool = False
    """Whether a function is replaced in all modules that have imported it, and not in its own alone."""

    def distribution(self) -> tuple[str, str]:
        """The name and the version of what is installed."""
        for name in self.checked:
            try:
                return name, version(name)
            except PackageNotFoundError:
                continue
        return next(iter(self.checked)), "of an unknown version"

    def release(self) -> str:
        """The version of what is installed."""
        return self.distribution()[1]

    def lacks(self, name: EngineName) -> UnsupportedEngineError:
        """The error for a name that is not there."""
        package, found = self.distribution()
        title = self.title or package
        return UnsupportedEngineError(
            f"{title} {found} has no {name}, which k26-plugins needs to {name.why}: it was checked on {title} "
            f"{self.checked[package]}. Install one of these, or {self.without}."
        )

    def private(self, name: EngineName) -> Any:
        """What a name stands for. Raises UnsupportedEngineError where it is gone, ImportError where the engine is."""
        try:
            return name.look_up()
        except (ImportError, AttributeError) as error:
            if find_spec(name.module.split(".")[0]) is None:
                raise
            raise self.lacks(name) from error

    def member(self, owner: object, name: EngineName) -> Any:
        """What an object of the engine's has by a name, in whichever class. Raises UnsupportedEngineError where it is
        gone."""
        try:
            return getattr(owner, name.attribute)
        except AttributeError as error:
            raise self.lacks(name) from error

    def has_module(self, name: EngineName) -> bool:
        """Whether this release has the module of a name. No more of it is imported than the packages that it is in."""
        parts = name.module.split(".")
        return all(find_spec(".".join(parts[:end])) for end in range(1, len(parts) + 1))

    def has(self, name: EngineName) -> bool:
        """Whether this release has a name. Raises what the import of its module raises."""
        if not self.has_module(name):
            return False
        importlib.import_module(name.module)
        try:
            name.look_up()
        except AttributeError:
            return False
        return True

    def first(self, *names: EngineName) -> EngineName:
        """The first that this release has, of names for the same in several releases, newest first; where it has none, the
        newest, for the error."""
        return next((name for name in names if self.has(name)), names[0])

    def wrap(self, changes: Registration, name: EngineName, hook: Callable[..., Any]) -> None:
        """Note that `hook(original, …)` goes around a function or a method. Raises as `private`."""
        self.private(name)
        changes.wrap(self.private(name.owner), name.attribute, hook, everywhere=self.wraps_everywhere)

    def hook(self, around: Callable[..., Any], *names: EngineName) -> None:
        """Put `around(original, …)` around functions or methods, all or none, at once. Raises as `private`."""
        changes = Registration()
        for name in names:
            self.wrap(changes, name, around)
        changes.apply()
