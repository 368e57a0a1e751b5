"""The fixture with the server that the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import vllm_updates
from support.server import Server, python_path
from support.vllm_server import serve


@pytest.fixture(scope="session")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that answers with the model's tokens, or with those that a request orders
    (support/vllm_scripted.py)."""
    arguments = ["--enforce-eager", "--logits-processors", "support.vllm_scripted:Scripted"]
    # The declarations of an agent's tools are many tokens of the tiny tokenizer.
    arguments += ["--max-model-len", "16384"]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    # These arguments give the server the endpoints by which a trainer calls the workers.
    arguments += vllm_updates.ARGUMENTS
    settings = {"PYTHONPATH": python_path(), "VLLM_SERVER_DEV_MODE": "1"}
    with serve(tiny_folder, log, *arguments, **settings) as running:
        yield running
