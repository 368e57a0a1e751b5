"""What an adapter puts around functions of its engine's, and what it does without where one is gone."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from k26_plugins.common.adapters.engine import EngineName
from k26_plugins.common.settings import ENGINE, PARSERS, PROMPTS, STRICT

Hook = tuple[EngineName, Callable[..., Any], str]
"""A function of the engine's, what goes around it, and what is lost where it is not there."""


@dataclass(frozen=True)
class Later:
    """The function `module.name`, imported when it is called first: what is registered in every process must be cheap."""

    module: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return getattr(importlib.import_module(self.module), self.name)(*args, **kwargs)


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
