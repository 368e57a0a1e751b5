"""Describes hooks that an adapter puts around its engine's functions, and logs what is lost where a function is
gone."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from k26_plugins.common.adapters.engine import EngineName
from k26_plugins.common.settings import ENGINE, PARSERS, PROMPTS, STRICT

Hook = tuple[EngineName, Callable[..., Any], str]
"""The name of an engine's function, the function that wraps it, and what is lost in a release that does not have it."""


@dataclass(frozen=True)
class Later:
    """A stand-in for the function `module.name`, whose module is imported only when the function is called.

    A hook is registered in every process of an engine, and that must be cheap.
    """

    module: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Import the module, call the function and return its result."""
        return getattr(importlib.import_module(self.module), self.name)(*args, **kwargs)


def wanted_hooks(requests: Sequence[Hook], answers: Sequence[Hook]) -> list[Hook]:
    """Return the hooks that an API server needs.

    Those of `requests` are left out if the user leaves prompts to the engine (K26_PROMPTS=engine), those of `answers`
    if the user leaves the parsers to the engine (K26_PARSERS=engine).
    """
    return [*(requests if PROMPTS.read() != ENGINE else ()), *(answers if PARSERS.read() != ENGINE else ())]


def go_without(error: Exception, lost: str, logger: logging.Logger) -> None:
    """Log that this release of the engine lacks a name, and what is lost by that.

    With K26_STRICT=1 raise SystemExit instead, which ends the start: engines log any other exception of a plugin and go
    on.

    error: says which name is missing. lost: what happens without it, worded as the end of "Without it …".
    """
    if STRICT.read():
        raise SystemExit(f"k26-plugins: {error} Without it {lost}, and {STRICT.variable}=1 stops the start.") from error
    logger.warning("k26-plugins: %s Without it %s.", error, lost)
