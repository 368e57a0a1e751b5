"""Tests the agent loop of Anthropic's SDK in `/v1/messages`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anthropic
import pytest
from support.clients.turns import CUT, ERROR, FUNCTIONS, IMAGE, QUESTION, TURNS, ScriptedTests, tokens, with_parts
from support.conversations import Conversation, core_token_ids
from support.scripted import TOOLS
from support.server import Server

from k26_plugins.common.prompt.output import THINK_END

ANTHROPIC_PICTURE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": IMAGE["image_url"]["url"].partition(",")[2]},
}


class AnthropicClientTests(ScriptedTests):
    """Tests of `/v1/messages` that each engine's tests derive, and run with that engine's server."""

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_messages_loop(self, server: Server, tiny_folder: Path, stream: bool) -> None:
        client = _anthropic(server)
        messages: list[Any] = [{"role": "user", "content": [ANTHROPIC_PICTURE, QUESTION["content"][1]]}]
        chat = [QUESTION]
        for turn in TURNS:
            request: Any = {
                "model": server.model,
                "messages": messages,
                "max_tokens": 500,
                "tools": [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in FUNCTIONS],
                "extra_body": self.script(tiny_folder, turn.answer),
            }
            if stream:
                with client.messages.stream(**request) as events:
                    answer = events.get_final_message()
            else:
                answer = client.messages.create(**request)
            found = {block.id: (block.name, block.input) for block in answer.content if block.type == "tool_use"}
            assert list(found.values()) == list(turn.calls.values())
            assert "".join(block.text for block in answer.content if block.type == "text") == turn.content
            assert "".join(block.thinking for block in answer.content if block.type == "thinking") == turn.reasoning
            assert answer.stop_reason == ("tool_use" if turn.calls else "end_turn")
            assert answer.usage.output_tokens > 0
            prompt = core_token_ids(tiny_folder, Conversation("messages", chat, TOOLS))
            assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == len(prompt)
            chat += turn.in_chat()
            messages.append({"role": "assistant", "content": [block.model_dump() for block in answer.content]})
            messages.append(
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": call_id,
                            "content": result.removeprefix("Error: ") if isinstance(result, str) else result,
                            "is_error": result == ERROR,
                        }
                        for call_id, result in zip(
                            found, with_parts(ANTHROPIC_PICTURE, turn.results, "text"), strict=True
                        )
                    ],
                }
            )

    def test_a_message_cut_in_a_call(self, server: Server, tiny_folder: Path) -> None:
        client = _anthropic(server)
        answer = client.messages.create(
            model=server.model,
            messages=[{"role": "user", "content": "x"}],
            max_tokens=tokens(tiny_folder, CUT),
            tools=[{"name": tool["name"], "input_schema": tool["parameters"]} for tool in FUNCTIONS],
            extra_body=self.script(tiny_folder, CUT + "x" * 200),
        )
        assert answer.stop_reason == "max_tokens"
        assert [block.type for block in answer.content] == ["thinking", "text"]

    def test_a_message_cut_in_its_reasoning(self, server: Server, tiny_folder: Path) -> None:
        client = _anthropic(server)
        answer = client.messages.create(
            model=server.model,
            messages=[{"role": "user", "content": "x"}],
            max_tokens=20,
            extra_body=self.script(tiny_folder, "a" * 50 + THINK_END),
        )
        assert answer.stop_reason == "max_tokens"
        (thought,) = [block for block in answer.content if getattr(block, "text", None) != ""]
        assert thought.type == "thinking"
        assert set(thought.thinking) == {"a"}


def _anthropic(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)
