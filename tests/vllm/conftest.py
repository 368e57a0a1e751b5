"""The server that the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import vllm_updates
from support.server import Server, python_path
from support.vllm_server import serve


@pytest.fixture(scope="session")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose answers are the model's, or made to order where a request says so (support/vllm_scripted.py)."""
    arguments = ["--enforce-eager", "--logits-processors", "support.vllm_scripted:Scripted"]
    # An agent's tools are long to the tiny tokenizer.
    arguments += ["--max-model-len", "16384"]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    # These give it the endpoints by which a trainer calls the workers.
    arguments += vllm_updates.ARGUMENTS
    settings = {"PYTHONPATH": python_path(), "VLLM_SERVER_DEV_MODE": "1"}
    with serve(tiny_folder, log, *arguments, **settings) as running:
        yield running
