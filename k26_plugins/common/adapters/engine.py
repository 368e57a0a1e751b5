"""The engine that an adapter is for: which release is installed, and its private names or one clear error."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any


class UnsupportedEngineError(RuntimeError):
    """An engine in which something that an adapter needs is not where it was."""


@dataclass(frozen=True)
class Engine:
    """An engine by its distributions."""

    checked: Mapping[str, str]
    """By the distribution's name, in the order in which they are looked for: the releases that were checked."""
    without: str
    """What else a user can do, as the end of "Install one of these, or …"."""
    title: str = ""
    """What users call it, if that is not the distribution's name."""

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

    def lacks(self, module: str, name: str) -> UnsupportedEngineError:
        """The error for a `name` that `module` does not have."""
        package, found = self.distribution()
        title = self.title or package
        return UnsupportedEngineError(
            f"{title} {found} has no {module}.{name}, which k26-plugins needs: it was checked on {title} "
            f"{self.checked[package]}. Install one of these, or {self.without}."
        )

    def private(self, module: str, name: str) -> Any:
        """An engine-private `name`. Raises UnsupportedEngineError where it is gone, ImportError where the engine is."""
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            if find_spec(module.split(".")[0]) is None:
                raise
            raise self.lacks(module, name) from error
