"""Fixtures with the servers that the tests of several files ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import documented, sglang_orders
from support.entry_point import of_sglang
from support.grpc_chat import HAS_GRPC
from support.server import Server, free_port
from support.sglang_server import CHUNK, EAGER, serve


@pytest.fixture(scope="session")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that compiles the vision tower's interpolation."""
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    with serve(tiny_folder, log, "--chunked-prefill-size", str(CHUNK), "--enable-cache-report") as running:
        yield running


@pytest.fixture(scope="session")
def scripted_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that answers with the tokens that a request orders.

    Tests can have their own code run in its process. It also takes requests by gRPC, if this SGLang does.
    """
    log = tmp_path_factory.mktemp("scripted") / "server.log"
    command = [*documented.as_run(documented.SERVE_SGLANG, tiny_folder), "--"]
    settings = {**EAGER, **of_sglang(sglang_orders, tmp_path_factory.mktemp("orders") / "plugin")}
    # A prompt is prefilled in one piece: the logit processor that writes the ordered answer is called for each piece,
    # and would begin too early.
    arguments = ["--enable-custom-logit-processor", "--enable-metrics", "--chunked-prefill-size", "-1"]
    if HAS_GRPC:
        arguments += ["--grpc-port", str(free_port())]
    with serve(tiny_folder, log, *arguments, command=command, **settings) as running:
        yield running
