"""SGLang's server for the tests."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from support.server import Server, run_server

# SGLang 0.5.10 has no entry point for plugins: its users set PYTHONPATH.
HAS_ENTRY_POINT = find_spec("sglang.srt.plugins") is not None


def serve(folder: Path, log: Path, *arguments: str, **environment: str) -> AbstractContextManager[Server]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--device", "cpu"]
    # An idle scheduler would take a core from the tests.
    command += ["--max-total-tokens", "20000", "--mem-fraction-static", "0.2", "--sleep-on-idle", *arguments]
    settings = {"SGLANG_USE_CPU_ENGINE": "1", **environment}
    if not HAS_ENTRY_POINT:
        settings["PYTHONPATH"] = boot_folder()
    return run_server(command, folder, log, settings, ready="fired up")


@cache
def boot_folder() -> str:
    """As the README says to find it."""
    command = [sys.executable, "-m", "k26_plugins.sglang.boot"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
