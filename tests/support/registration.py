"""Tests that an adapter's registration changes everything or nothing, whatever fails in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from k26_plugins.common.adapters.engine import Engine, EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.registration import Registration


def assert_all_or_nothing(
    compat: Any, register: Callable[[], None], state: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> int:
    """Assert that `register` changes nothing if it fails, and return how many of the engine's names it looks up.

    `register` is called with each name missing in turn, then with each of its changes failing in turn, and at last with
    nothing wrong. A failing call must log that the plugin is not active. state: returns everything that registration
    changes.
    """
    private, apply = compat.private, Registration.apply
    before = state()
    looked_up = changed = 0

    def without(number: int) -> Callable[..., Any]:
        def look_up(name: EngineName) -> Any:
            nonlocal looked_up
            looked_up += 1
            if looked_up == number:
                raise UnsupportedEngineError(f"no {name}")
            return private(name)

        return look_up

    def failing_at(number: int) -> Callable[[Registration], None]:
        def apply_some(changes: Registration) -> None:
            nonlocal changed
            changed = len(changes._changes)
            changes._changes.insert(number, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
            apply(changes)

        return apply_some

    def fails() -> bool:
        caplog.clear()
        register()
        failed = "k26-plugins is not active" in caplog.text
        assert state() == before or not failed
        return failed

    with pytest.MonkeyPatch.context() as patch:
        # Code that wraps the engine's functions looks them up by `Engine.private`, of which `compat.private` is a bound
        # method.
        patch.setattr(Engine, "private", lambda _, name: compat.private(name))
        for number in range(1, 100):
            looked_up = 0
            patch.setattr(compat, "private", without(number))
            patch.setattr(Registration, "apply", failing_at(10**6))
            assert fails()
            if looked_up < number:
                break
        patch.setattr(compat, "private", private)
        for number in range(changed):
            patch.setattr(Registration, "apply", failing_at(number))
            assert fails()
    assert not fails()
    assert changed >= 5
    return looked_up
