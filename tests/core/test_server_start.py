"""Tests of how long the tests of the engines wait for a server: they look at what the server does, not at the clock."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import progress
from support.server import StartError, run_server

SERVE = """
import sys
from http.server import HTTPServer, SimpleHTTPRequestHandler
HTTPServer(("127.0.0.1", int(sys.argv[-1])), SimpleHTTPRequestHandler).serve_forever()
"""
SLOW = f"import time\nfor _ in range(8): print('loading', flush=True); time.sleep(0.25)\n{SERVE}"


def start(program: str, folder: Path) -> None:
    (folder / "health").touch()
    program = f"import os; os.chdir({str(folder)!r})\n{program}"
    with run_server([sys.executable, "-c", program], folder, folder / "log", {}):
        pass


def test_a_slow_start_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STILL_SECONDS", 1.5)
    start(SLOW, tmp_path)


def test_one_that_stands_still_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STILL_SECONDS", 1.5)
    with pytest.raises(StartError, match=r"no CPU time for [12] s:\nlast words"):
        start("print('last words', flush=True); import time; time.sleep(100)", tmp_path)


def test_one_that_is_busy_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CPU_SECONDS", 1)
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with pytest.raises(StartError, match=r"not ready after \d s of CPU time"):
        start(program, tmp_path)


def test_one_that_ends_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no such flag"):
        start("raise SystemExit('no such flag')", tmp_path)
