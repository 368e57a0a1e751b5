"""`k26 golden` as the tests run it."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from k26_plugins.cli import app


def golden(folder: Path, prompts: Path, out: Path) -> Path:
    command = ["golden", str(folder), "--prompts", str(prompts), "--out", str(out), "--answer-tokens", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return out
