"""The operator's commands in SGLang's environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from k26_plugins.cli import app


def doctor(tiny_folder: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["doctor", "--checkpoint", str(tiny_folder), "--engine", "sglang", "--json"])
    return result.exit_code, {finding["what"]: finding for finding in json.loads(result.stdout)}


def test_the_doctor_sees_the_plugin(tiny_folder: Path) -> None:
    code, found = doctor(tiny_folder)
    assert code == 0, found
    assert found["sglang"]["detail"].endswith("the plugin is active")


def test_the_doctor_sees_that_the_plugin_is_off(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "none")
    code, found = doctor(tiny_folder)
    assert code == 1
    assert "NOT active: SGLANG_PLUGINS is set" in found["sglang"]["detail"]
