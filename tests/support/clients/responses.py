"""Tests the agent loop of OpenAI's SDK in `/v1/responses`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from support.clients.turns import (
    CUT,
    FUNCTIONS,
    IMAGE,
    QUESTION,
    TURNS,
    ScriptedTests,
    openai_client,
    tokens,
    with_parts,
)
from support.conversations import Conversation, core_token_ids
from support.scripted import TOOLS
from support.server import Server

from k26_plugins.common.prompt.output import THINK_END

RESPONSES_PICTURE = {"type": "input_image", "image_url": IMAGE["image_url"]["url"], "detail": "auto"}


class ResponsesClientTests(ScriptedTests):
    """Tests of `/v1/responses` that each engine's tests derive, and run with that engine's server."""

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_responses_loop(self, server: Server, tiny_folder: Path, stream: bool) -> None:
        client = openai_client(server)
        text = {"type": "input_text", "text": QUESTION["content"][1]["text"]}
        items: list[Any] = [{"type": "message", "role": "user", "content": [RESPONSES_PICTURE, text]}]
        chat = [QUESTION]
        for turn in TURNS:
            request: Any = {
                "model": server.model,
                "input": items,
                "max_output_tokens": 500,
                "store": False,
                "tools": [{"type": "function", "strict": False, **tool} for tool in FUNCTIONS],
                "extra_body": self.script(tiny_folder, turn.answer),
            }
            answer = _response(client, request, stream, "response.completed")
            calls = [item for item in answer.output if item.type == "function_call"]
            assert [(item.name, json.loads(item.arguments)) for item in calls] == list(turn.calls.values())
            assert answer.output_text == turn.content
            assert _thoughts(answer) == turn.reasoning
            prompt = core_token_ids(tiny_folder, Conversation("responses", chat, TOOLS))
            assert answer.usage.input_tokens == len(prompt)
            chat += turn.in_chat()
            items += [item.model_dump(exclude_none=True) for item in answer.output]
            for item, result in zip(calls, with_parts(RESPONSES_PICTURE, turn.results, "input_text"), strict=True):
                items.append({"type": "function_call_output", "call_id": item.call_id, "output": result})

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_a_response_cut_in_a_call(self, server: Server, tiny_folder: Path, stream: bool) -> None:
        client = openai_client(server)
        request: Any = {
            "model": server.model,
            "input": "x",
            "max_output_tokens": tokens(tiny_folder, CUT),
            "tools": [{"type": "function", "strict": False, **tool} for tool in FUNCTIONS],
            "extra_body": self.script(tiny_folder, CUT + "x" * 200),
        }
        answer = _response(client, request, stream, "response.incomplete")
        assert answer.status == "incomplete"
        assert answer.output_text == "ok"

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_a_response_cut_in_its_reasoning(self, server: Server, tiny_folder: Path, stream: bool) -> None:
        client = openai_client(server)
        request: Any = {
            "model": server.model,
            "input": "x",
            "max_output_tokens": 20,
            "extra_body": self.script(tiny_folder, "a" * 50 + THINK_END),
        }
        answer = _response(client, request, stream, "response.incomplete")
        assert answer.status == "incomplete"
        assert answer.output_text == ""
        assert set(_thoughts(answer)) == {"a"}


def _response(client: openai.OpenAI, request: dict[str, Any], stream: bool, last_event: str) -> Any:
    """Return the answer of the Responses API, from its last event if it is streamed. last_event: that event's type."""
    if not stream:
        return client.responses.create(**request)
    *_, last = client.responses.create(**request, stream=True)
    assert last.type == last_event
    return last.response


def _thoughts(answer: Any) -> str:
    return "".join(part.text for item in answer.output if item.type == "reasoning" for part in item.content or [])
