"""Registration without each name that it looks up, in turn, and with each of its changes failing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from k26_plugins.common.adapters.engine import Engine, EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.registration import Registration


def assert_all_or_nothing(
    compat: Any, register: Callable[[], None], state: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> int:
    """How many names of the engine `register` looks up, and with each of them missing in turn; the last call has them all.

    state: everything that registration changes. Each failing call says that the plugin is not active, and changes nothing.
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
        # What puts hooks around names looks them up by the method that `compat.private` is.
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
