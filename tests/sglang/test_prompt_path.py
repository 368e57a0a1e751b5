"""From a request to token ids and back, through the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.agents import AgentTests
from support.clients import AnthropicClientTests, OpenAIClientTests, ResponsesClientTests
from support.prompt_path import PromptPathTests
from support.server import Server
from support.sglang_scripted import Scripted

from k26_plugins.common.prompt.tokenizer import KimiTokenizer


@pytest.fixture(scope="module")
def server(scripted_server: Server) -> Server:
    return scripted_server


class Ordered:
    def script(self, folder: Path, answer: str) -> dict[str, Any]:
        tokenizer = KimiTokenizer(folder)
        token_ids = [*tokenizer.encode_prompt(answer), tokenizer.named["<|im_end|>"]]
        return {"custom_logit_processor": Scripted.to_str(), "custom_params": {"script": token_ids}}


class TestPromptPath(Ordered, PromptPathTests):
    parsers = "reasoning parser kimi_k2, tool-call parser kimi_k2"
    hostile_requests = 25


class TestClients(Ordered, OpenAIClientTests, AnthropicClientTests, ResponsesClientTests):
    """All three interfaces take the fields that order an answer, two of them by a plugin of the tests'."""


class TestAgents(Ordered, AgentTests):
    pass
