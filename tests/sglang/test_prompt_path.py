"""Tests of the way from a request to token ids and back, through the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.agents import AgentTests
from support.clients.chat_completions import OpenAIClientTests
from support.clients.messages import AnthropicClientTests
from support.clients.responses import ResponsesClientTests
from support.grpc_chat import HAS_GRPC, chat_by_grpc
from support.prompt_path import PromptPathTests
from support.scripted import TOOLS
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
    adversarial_requests = 25
    places_of_tokens = False

    @pytest.mark.skipif(not HAS_GRPC, reason="this SGLang serves no gRPC")
    def test_a_chat_by_grpc(self, server: Server, tiny_folder: Path) -> None:
        """A gRPC request has no HTTP body to read, and its answer is parsed all the same."""
        quoted = (
            "r</think>ok<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}"
        )
        answer = chat_by_grpc(
            server,
            messages=[{"role": "user", "content": "a"}],
            max_tokens=200,
            tools=TOOLS,
            **self.script(tiny_folder, f"{quoted}<|tool_call_end|><|tool_calls_section_end|>"),
        )
        assert "choices" in answer, answer
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("r", "ok")
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["now"]


class TestClients(Ordered, OpenAIClientTests, AnthropicClientTests, ResponsesClientTests):
    """Tests with clients of three APIs. Each API takes the fields that order an answer, two of them through a plugin of
    the tests' own."""


class TestAgents(Ordered, AgentTests):
    pass
