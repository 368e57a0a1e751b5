"""The servers that several files ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import documented
from support.server import Server, python_path
from support.sglang_server import CHUNK, EAGER, serve


@pytest.fixture(scope="session")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the vision tower's interpolation compiled."""
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    with serve(tiny_folder, log, "--chunked-prefill-size", str(CHUNK), "--enable-cache-report") as running:
        yield running


@pytest.fixture(scope="session")
def scripted_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answers are made to order, and tests are let into its process."""
    log = tmp_path_factory.mktemp("scripted") / "server.log"
    command = [*documented.as_run(documented.SERVE_SGLANG, tiny_folder), "--"]
    settings = {**EAGER, "PYTHONPATH": python_path()}
    arguments = ["--enable-custom-logit-processor", "--enable-metrics"]
    with serve(tiny_folder, log, *arguments, command=command, **settings) as running:
        yield running
