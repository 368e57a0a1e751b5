"""The operator's commands in SGLang's environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.doctor import doctor


def test_the_doctor_sees_the_plugin(tiny_folder: Path) -> None:
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "sglang")
    assert found["sglang"]["detail"].endswith("the plugin is active")


def test_the_doctor_sees_that_the_plugin_is_off(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "none")
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "sglang", code=1)
    assert "NOT active: SGLANG_PLUGINS is set" in found["sglang"]["detail"]
