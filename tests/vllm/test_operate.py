"""The operator's commands on the real vLLM: a checkpoint with a fault is found out, and the doctor sees the plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import doubled_scale
from support.vllm_server import serve
from typer.testing import CliRunner

from k26_plugins.cli import app


def test_a_faulty_expert_is_found_and_named(tiny_folder: Path, golden_file: Path, tmp_path: Path) -> None:
    folder = doubled_scale(tiny_folder, tmp_path / "faulty")
    with serve(folder, tmp_path / "server.log", "--enforce-eager") as server:
        result = CliRunner().invoke(app, ["verify", "--url", server.url, "--golden", str(golden_file)])
    assert result.exit_code == 1, result.output
    assert "routed expert 5 of layer 2" in result.output


def doctor(tiny_folder: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["doctor", "--checkpoint", str(tiny_folder), "--engine", "vllm", "--json"])
    return result.exit_code, {finding["what"]: finding for finding in json.loads(result.stdout)}


def test_the_doctor_sees_the_plugin(tiny_folder: Path) -> None:
    code, found = doctor(tiny_folder)
    assert code == 0, found
    assert found["vllm"]["detail"].endswith("the plugin is active")


def test_the_doctor_sees_that_the_plugin_is_off(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    code, found = doctor(tiny_folder)
    assert code == 1
    assert "NOT active: VLLM_PLUGINS is set" in found["vllm"]["detail"]
