"""Describes the engine that an adapter is for: finds the installed release, looks up the engine's private names, raises
one clear error where a name is gone, and puts hooks around functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from k26_plugins.common.adapters.registration import Registration


class UnsupportedEngineError(RuntimeError):
    """An installed engine lacks something that an adapter needs. The message says what, and the remedy."""


@dataclass(frozen=True)
class EngineName:
    """A name in an engine that an adapter touches and that the engine does not promise to keep.

    Each adapter has its names in one table, `names.py`: whatever the adapter looks up, patches, imports or derives
    from, and every attribute with an underscore. Other attributes of an object that was found by such a name (a
    registry's method, say) have no entry of their own. Creating an `EngineName` imports nothing.
    """

    module: str
    path: str
    """The path inside the module: `Class.method` for a method, empty for the module itself."""
    why: str
    """What the adapter needs the name for, worded as the end of "which k26-plugins needs to …"."""
    remove_when: str
    """What has to be true before the adapter can do without the name, and the entry can be removed."""
    since: str = ""
    """The first checked release that has the name; empty if the earliest checked release has it."""
    until: str = ""
    """The last checked release that has the name; empty if the latest checked release has it."""

    def __str__(self) -> str:
        return f"{self.module}.{self.path}" if self.path else self.module

    @property
    def owner(self) -> EngineName:
        """The object that a patch changes: the class for a method, the module for anything else."""
        return replace(self, path=self.path.rpartition(".")[0])

    @property
    def attribute(self) -> str:
        """The last part of the path: the name of the attribute of `owner`."""
        return self.path.rpartition(".")[2]

    def look_up(self) -> Any:
        """Import the module and return what the name stands for. Raises ImportError or AttributeError."""
        found: Any = importlib.import_module(self.module)
        for part in self.path.split(".") if self.path else ():
            found = getattr(found, part)
        return found


@dataclass(frozen=True)
class Engine:
    """An engine, which one of several Python distributions provides."""

    checked: Mapping[str, str]
    """The range of checked releases for each distribution's name. Distributions are looked for in this order."""
    without: str
    """What a user can do instead, worded as the end of "Install one of these, or …"."""
    title: str = ""
    """What users call the engine, if that is not the distribution's name."""
    wraps_everywhere: bool = False
    """Whether a wrapped function is replaced in every module that has imported it by name, and not only in its own."""

    def distribution(self) -> tuple[str, str]:
        """Return the name and the version of the installed distribution.

        If none is installed, return the first name and the text "of an unknown version".
        """
        for name in self.checked:
            try:
                return name, version(name)
            except PackageNotFoundError:
                continue
        return next(iter(self.checked)), "of an unknown version"

    def release(self) -> str:
        """Return the version of the installed distribution."""
        return self.distribution()[1]

    def lacks(self, name: EngineName) -> UnsupportedEngineError:
        """Return the error, to be raised, for a name that the installed release does not have."""
        package, found = self.distribution()
        title = self.title or package
        return UnsupportedEngineError(
            f"{title} {found} has no {name}, which k26-plugins needs to {name.why}: it was checked on {title} "
            f"{self.checked[package]}. Install one of these, or {self.without}."
        )

    def private(self, name: EngineName) -> Any:
        """Return what a name stands for.

        Raises UnsupportedEngineError if the installed release does not have the name, and ImportError if the engine
        itself is not installed.
        """
        try:
            return name.look_up()
        except (ImportError, AttributeError) as error:
            if find_spec(name.module.split(".")[0]) is None:
                raise
            raise self.lacks(name) from error

    def member(self, owner: object, name: EngineName) -> Any:
        """Return the attribute of `owner` that a name's last part names, whichever class of the engine `owner` is of.

        Raises UnsupportedEngineError if the object does not have the attribute.
        """
        try:
            return getattr(owner, name.attribute)
        except AttributeError as error:
            raise self.lacks(name) from error

    def has_module(self, name: EngineName) -> bool:
        """Return whether this release has the module of a name.

        The packages that contain the module are imported, but the module itself is not.
        """
        parts = name.module.split(".")
        return all(find_spec(".".join(parts[:end])) for end in range(1, len(parts) + 1))

    def has(self, name: EngineName) -> bool:
        """Return whether this release has a name. Raises whatever the import of the name's module raises."""
        if not self.has_module(name):
            return False
        importlib.import_module(name.module)
        try:
            name.look_up()
        except AttributeError:
            return False
        return True

    def first(self, *names: EngineName) -> EngineName:
        """Return the first of some names that this release has.

        names: names of one thing in different releases, the newest first. If this release has none of them, the newest
        is returned, so that the error for a missing name is about that one.
        """
        return next((name for name in names if self.has(name)), names[0])

    def wrap(self, changes: Registration, name: EngineName, hook: Callable[..., Any]) -> None:
        """Note in `changes` that `hook(original, …)` is to be called in the place of a function or a method.

        Raises as `private` does.
        """
        self.private(name)
        changes.wrap(self.private(name.owner), name.attribute, hook, everywhere=self.wraps_everywhere)

    def hook(self, around: Callable[..., Any], *names: EngineName) -> None:
        """Have `around(original, …)` called in the place of each of some functions or methods, from now on.

        Either all of them are wrapped or none. Raises as `private` does.
        """
        changes = Registration()
        for name in names:
            self.wrap(changes, name, around)
        changes.apply()
