"""Tests of the way from a request to token ids and back, through the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.agents import AgentTests
from support.clients.chat_completions import OpenAIClientTests
from support.clients.messages import AnthropicClientTests
from support.clients.responses import ResponsesClientTests
from support.prompt_path import PromptPathTests
from support.vllm_scripted import script


class Ordered:
    def script(self, folder: Path, answer: str) -> dict[str, Any]:
        return script(folder, answer)


class TestPromptPath(Ordered, PromptPathTests):
    parsers = "reasoning parser k26, tool-call parser k26"
    adversarial_requests = 60
    places_of_tokens = True


class TestClients(Ordered, OpenAIClientTests, AnthropicClientTests, ResponsesClientTests):
    """Tests with clients of three APIs, each of which takes the field that orders an answer."""


class TestAgents(Ordered, AgentTests):
    pass
