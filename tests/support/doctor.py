"""Runs `k26 doctor` in this process and reads its JSON."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from k26_plugins.cli import app


def doctor(*options: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Return the findings of `k26 doctor`, by what each is about.

    code: the exit status that the command must end with.
    """
    result = CliRunner().invoke(app, ["doctor", *options, "--json"])
    assert result.exit_code == code, result.output
    return {finding["what"]: finding for finding in json.loads(result.stdout)}
