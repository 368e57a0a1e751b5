"""Tests the agent loop of OpenAI's SDK in `/v1/chat/completions`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel
from support.clients.turns import CUT, QUESTION, TURNS, ScriptedTests, Turn, openai_client, tokens
from support.conversations import Conversation, core_token_ids
from support.scripted import TOOLS
from support.server import Server
from support.videos import make_video, video_part

from k26_plugins.common.prompt.output import THINK_END


class Report(BaseModel):
    city: str
    warm: bool


FORCED = Turn("One.", "", {"functions.get_weather:0": ("get_weather", {"city": "北京"})}, ())


class OpenAIClientTests(ScriptedTests):
    """Tests of `/v1/chat/completions` that each engine's tests derive, and run with that engine's server."""

    @pytest.fixture
    def client(self, server: Server) -> openai.OpenAI:
        return openai_client(server)

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_chat_loop(self, client: openai.OpenAI, server: Server, tiny_folder: Path, stream: bool) -> None:
        messages: list[Any] = [QUESTION]
        for turn in TURNS:
            answer = _ask(client, server, messages, self.script(tiny_folder, turn.answer), stream, tools=TOOLS)
            choice = answer.choices[0]
            message = choice.message
            assert _reasoning(message) == turn.reasoning
            assert (message.content or "") == turn.content
            found = {
                one.id: (one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls or []
            }
            assert found == turn.calls
            assert choice.finish_reason == ("tool_calls" if turn.calls else "stop")
            expected = core_token_ids(tiny_folder, Conversation("loop", messages, TOOLS))
            assert answer.usage.prompt_tokens == len(expected)
            # Clients send back every field of the answer's message.
            messages = [*messages, message.model_dump(exclude_none=True)]
            for call_id, result in zip(turn.calls, turn.results, strict=True):
                messages.append({"role": "tool", "tool_call_id": call_id, "content": result})

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_an_answer_cut_in_its_reasoning(
        self, client: openai.OpenAI, server: Server, tiny_folder: Path, stream: bool
    ) -> None:
        script = self.script(tiny_folder, "a" * 50 + THINK_END)
        answer = _ask(client, server, [QUESTION], script, stream, tools=TOOLS, max_tokens=20)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "length"
        assert set(_reasoning(message)) == {"a"}
        assert not message.content
        assert not message.tool_calls
        assert answer.usage.completion_tokens == 20

    def test_a_schema_with_thinking(self, client: openai.OpenAI, server: Server, tiny_folder: Path) -> None:
        report = Report(city="北京", warm=True)
        completion = client.chat.completions.parse(
            model=server.model,
            messages=[QUESTION],
            response_format=Report,
            max_tokens=500,
            extra_body=self.script(tiny_folder, f"Both.{THINK_END}{report.model_dump_json()}"),
        )
        message = completion.choices[0].message
        assert message.parsed == report
        assert _reasoning(message) == "Both."

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_an_answer_cut_in_a_call(
        self, client: openai.OpenAI, server: Server, tiny_folder: Path, stream: bool
    ) -> None:
        """An answer that the token limit cuts within a call's arguments has the arguments up to there; one that it cuts
        before the arguments has no call."""
        script = self.script(tiny_folder, CUT + "x" * 200)
        for written, arguments in ((CUT, ['{"city":"']), (CUT.removesuffix('{"city":"'), [])):
            limit = tokens(tiny_folder, written)
            answer = _ask(client, server, [QUESTION], script, stream, tools=TOOLS, max_tokens=limit)
            message = answer.choices[0].message
            assert answer.choices[0].finish_reason == "length"
            assert [call.function.arguments for call in message.tool_calls or []] == arguments
            assert (_reasoning(message), message.content or "") == ("why", "ok")

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize(
        "options",
        [{"tools": TOOLS, "tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": "none"}, {}],
        ids=["auto", "none", "no tools"],
    )
    def test_the_choice_of_a_tool(
        self, client: openai.OpenAI, server: Server, tiny_folder: Path, options: dict[str, Any], stream: bool
    ) -> None:
        """If a request offers no tools or forbids calls, the answer has no call, and its content no text of one."""
        turn = TURNS[0]
        answer = _ask(client, server, [QUESTION], self.script(tiny_folder, turn.answer), stream, **options)
        message = answer.choices[0].message
        assert message.content == turn.content
        assert len(message.tool_calls or []) == (len(turn.calls) if options.get("tool_choice") == "auto" else 0)

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
    )
    def test_a_tool_that_must_be_called(
        self, client: openai.OpenAI, server: Server, tiny_folder: Path, choice: Any, stream: bool
    ) -> None:
        """The call comes after the reasoning in the form that the model knows, because a grammar allows nothing
        else."""
        script = self.script(tiny_folder, FORCED.answer)
        answer = _ask(client, server, [QUESTION], script, stream, tools=TOOLS, tool_choice=choice)
        message = answer.choices[0].message
        assert (_reasoning(message), message.content or "") == (FORCED.reasoning, "")
        found = {one.id: (one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls or []}
        assert found == FORCED.calls

    def test_a_video_and_several_answers_with_logprobs(
        self, client: openai.OpenAI, server: Server, tiny_folder: Path
    ) -> None:
        content = [video_part(make_video(8)), {"type": "text", "text": "What happens?"}]
        messages = [{"role": "user", "content": content}]
        script = self.script(tiny_folder, f"a{THINK_END}He fell.")
        answer = _ask(client, server, messages, script, False, n=2, logprobs=True, top_logprobs=2)
        assert answer.usage.prompt_tokens == len(core_token_ids(tiny_folder, Conversation("video", messages)))
        assert [one.index for one in answer.choices] == [0, 1]
        for choice in answer.choices:
            assert (_reasoning(choice.message), choice.message.content) == ("a", "He fell.")
            found = choice.logprobs.content
            assert "He fell." in "".join(one.token for one in found)
            assert {len(one.top_logprobs) for one in found} == {2}


def _ask(
    client: openai.OpenAI, server: Server, messages: Any, script: dict[str, Any], stream: bool, **options: Any
) -> Any:
    request = {"model": server.model, "messages": messages, "max_tokens": 500, "extra_body": script, **options}
    if not stream:
        return client.chat.completions.create(**request)
    state: Any = ChatCompletionStreamState()
    for chunk in client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        state.handle_chunk(chunk)
    try:
        return state.get_final_completion()
    except openai.LengthFinishReasonError as cut:
        return cut.completion


def _reasoning(message: Any) -> str:
    """Return the reasoning content, and assert that the message has it under both names that clients know."""
    extra = message.model_extra
    assert extra.get("reasoning") == extra.get("reasoning_content")
    return extra.get("reasoning") or ""
