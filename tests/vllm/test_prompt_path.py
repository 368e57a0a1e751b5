"""From a request to token ids and back, through the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clients import AnthropicClientTests, ImageResultTests, OpenAIClientTests, ResponsesClientTests
from support.prompt_path import PromptPathTests
from support.server import Server, python_path
from support.vllm_scripted import script
from support.vllm_server import serve


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    scripted = ("--logits-processors", "support.vllm_scripted:Scripted")
    with serve(tiny_folder, log, "--enforce-eager", *scripted, PYTHONPATH=python_path()) as running:
        yield running


class Ordered:
    def script(self, folder: Path, answer: str) -> dict[str, Any]:
        return script(folder, answer)


class TestPromptPath(Ordered, PromptPathTests):
    parsers = "reasoning parser k26, tool-call parser k26"
    hostile_requests = 60


class TestClients(Ordered, OpenAIClientTests, AnthropicClientTests, ResponsesClientTests, ImageResultTests):
    """All three interfaces take the field that orders an answer."""
