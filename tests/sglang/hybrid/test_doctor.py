"""Tests of what `k26 doctor` says about KTransformers' command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.doctor import doctor
from support.sglang_server import boot_folder, needs_fork


@needs_fork
@pytest.mark.parametrize("is_on_path", [True, False])
def test_the_doctor_says_what_kt_run_would_start(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, is_on_path: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", boot_folder() if is_on_path else "")
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "sglang", code=0 if is_on_path else 1)
    word, starts = ("active", "with") if is_on_path else ("NOT active: this SGLang has no plugins", "WITHOUT")
    assert found["sglang"]["detail"].startswith(f"sglang-kt 0.7.2: the plugin is {word}")
    assert f"`kt run` starts sglang-kt 0.7.2 {starts} the plugin" in found["ktransformers"]["detail"]
    if not is_on_path:
        line = f"{found['sglang']['fix']} && printenv PYTHONPATH"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        printed = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        )
        assert printed.stdout.strip() == boot_folder()
