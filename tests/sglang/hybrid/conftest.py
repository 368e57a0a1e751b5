"""Fixtures with the command line of a hybrid run, as SGLang reads it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from support.sglang_server import hybrid_flags

from k26_plugins.sglang import compat

# SGLang reads this variable when it is imported, which nothing above does.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"


@pytest.fixture
def arguments(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return SGLang's own reading of a hybrid run's command line."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    command = ["--model-path", str(tiny_folder), "--device", "cpu", *hybrid_flags(tiny_folder, 4)]
    arguments = ServerArgs.from_cli_args(parser.parse_args(command))
    monkeypatch.setattr(compat, "server_args", lambda: arguments)
    return arguments


@pytest.fixture
def on_gpu(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the hybrid run's arguments as on a machine where torch finds a GPU."""
    monkeypatch.setattr(compat, "device_type", lambda: "cuda")
    arguments.disable_cuda_graph = False
    return arguments
