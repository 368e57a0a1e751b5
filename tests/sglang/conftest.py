"""The server that several files ask: one whose answers are made to order, and that lets tests into its process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import documented
from support.server import Server, python_path
from support.sglang_server import EAGER, serve


@pytest.fixture(scope="session")
def scripted_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("scripted") / "server.log"
    command = [*documented.as_run(documented.SERVE_SGLANG, tiny_folder), "--"]
    settings = {**EAGER, "PYTHONPATH": python_path()}
    with serve(tiny_folder, log, "--enable-custom-logit-processor", command=command, **settings) as running:
        yield running
