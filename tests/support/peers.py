"""Replaces kernels that need a GPU, for the tests of the engines' kernels that `k26 tune` times."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import create_autospec

import pytest


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[..., Any]], None]:
    """Return a function that replaces a module's function, given the module, its name and a callable for the result.

    The replacement takes only arguments that the original takes, so that a wrong call fails.
    """

    def replace(module: str, name: str, result: Callable[..., Any]) -> None:
        original = getattr(import_module(module), name)
        monkeypatch.setattr(f"{module}.{name}", create_autospec(original, side_effect=result))

    return replace
