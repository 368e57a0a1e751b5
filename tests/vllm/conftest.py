"""The server that the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import Server
from support.vllm_server import serve


@pytest.fixture(scope="session")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_folder, tmp_path_factory.mktemp("vllm") / "server.log", "--enforce-eager") as running:
        yield running
