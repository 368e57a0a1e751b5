"""What the tests of an engine's kernels for `k26 tune` share: kernels that need a GPU are taken the place of."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import create_autospec

import pytest


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[..., Any]], None]:
    """Puts what returns `result`, and takes only what the original takes, in the place of a module's function."""

    def replace(module: str, name: str, result: Callable[..., Any]) -> None:
        original = getattr(import_module(module), name)
        monkeypatch.setattr(f"{module}.{name}", create_autospec(original, side_effect=result))

    return replace
