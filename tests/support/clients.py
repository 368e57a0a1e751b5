"""Agent loops as the clients' own SDKs run them, against a server whose answers are made to order.

What they hold: the SDK reads every answer as it was written, streamed and not; and what it sends back, the model reads as
the core renders it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel
from support.conversations import Conversation, core_token_ids
from support.images import image_part, png, random_image
from support.scripted import TOOLS, call
from support.server import Server
from support.videos import make_video, video_part

from k26_plugins.common.prompt.output import CALL_ARGUMENTS, CALL_BEGIN, SECTION_BEGIN, SECTION_END, THINK_END
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

IMAGE = image_part(png(random_image(60, 40)))
ANTHROPIC_PICTURE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": IMAGE["image_url"]["url"].partition(",")[2]},
}
RESPONSES_PICTURE = {"type": "input_image", "image_url": IMAGE["image_url"]["url"], "detail": "auto"}
FUNCTIONS: list[Any] = [tool["function"] for tool in TOOLS]
QUESTION: dict[str, Any] = {"role": "user", "content": [IMAGE, {"type": "text", "text": "Is it warm in 北京?"}]}
ERROR = "Error: the clock does not answer"


@dataclass(frozen=True)
class Turn:
    reasoning: str
    content: str
    calls: dict[str, tuple[str, Any]]
    """Name and arguments by the call's id."""
    results: tuple[Any, ...]
    """Contents of the calls' results."""
    nothing: str = ""
    """How empty arguments are written."""

    @property
    def answer(self) -> str:
        """As the model writes it."""
        written = "".join(
            call(call_id, json.dumps(arguments, ensure_ascii=False) if arguments else self.nothing)
            for call_id, (_, arguments) in self.calls.items()
        )
        return f"{self.reasoning}{THINK_END}{self.content}" + (
            f"{SECTION_BEGIN}{written}{SECTION_END}" if written else ""
        )

    def in_chat(self) -> list[dict[str, Any]]:
        """The answer and its results as a chat's messages."""
        calls = [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for call_id, (name, arguments) in self.calls.items()
        ]
        answer = {"role": "assistant", "content": self.content, "reasoning": self.reasoning, "tool_calls": calls}
        results = zip(self.calls, self.results, strict=True)
        return [
            answer,
            *({"role": "tool", "tool_call_id": call_id, "content": result} for call_id, result in results),
        ]


TURNS = (
    Turn(
        "Two at once.",
        "I look at both.",
        {"functions.get_weather:0": ("get_weather", {"city": "北京"}), "functions.now:1": ("now", {})},
        ("22 °C, 晴", ERROR),
    ),
    # A picture of the result, twice.
    Turn("Again.", "", {"functions.now:2": ("now", {})}, ([{"type": "text", "text": "12:30"}, IMAGE, IMAGE],)),
    Turn("Now I know.", "北京 is warm.", {}, ()),
)


class Report(BaseModel):
    city: str
    warm: bool


class ScriptedTests:
    def __init_subclass__(cls) -> None:
        """Refuse two tests of one name: pytest would run the first alone."""
        names = [name for base in cls.__bases__ for name in vars(base) if name.startswith("test_")]
        assert len(names) == len(set(names)), f"two of the tests in {cls.__name__} have one name: {sorted(names)}"

    def script(self, folder: Path, answer: str) -> dict[str, Any]:
        """The fields of a request to a server of the checkpoint in `folder` that order `answer`, and its end."""
        raise NotImplementedError


class OpenAIClientTests(ScriptedTests):
    """`/v1/chat/completions`."""

    @pytest.fixture
    def client(self, server: Server) -> openai.OpenAI:
        return _openai(server)

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
            # As clients send it back: all that the answer said.
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
            messages=[QUESTION],  # type: ignore[list-item]
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
        """In its arguments they are what is there; before them there is no call."""
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
        """No call and nothing of one where there is to be none."""
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
        """After the reasoning, and in the form that the model knows: a grammar allows nothing else."""
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
    """By both names that clients know."""
    extra = message.model_extra
    assert extra.get("reasoning") == extra.get("reasoning_content")
    return extra.get("reasoning") or ""


FORCED = Turn("One.", "", {"functions.get_weather:0": ("get_weather", {"city": "北京"})}, ())
CUT = f'why{THINK_END}ok{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_ARGUMENTS}{{"city":"'


def tokens(folder: Path, text: str) -> int:
    return len(KimiTokenizer(folder).encode_prompt(text))


class AnthropicClientTests(ScriptedTests):
    """`/v1/messages`."""

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
                        for call_id, result in zip(found, _with(ANTHROPIC_PICTURE, turn.results, "text"), strict=True)
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


class ResponsesClientTests(ScriptedTests):
    """`/v1/responses`."""

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_responses_loop(self, server: Server, tiny_folder: Path, stream: bool) -> None:
        client = _openai(server)
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
            for item, result in zip(calls, _with(RESPONSES_PICTURE, turn.results, "input_text"), strict=True):
                items.append({"type": "function_call_output", "call_id": item.call_id, "output": result})

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_a_response_cut_in_a_call(self, server: Server, tiny_folder: Path, stream: bool) -> None:
        client = _openai(server)
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
        client = _openai(server)
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


def _openai(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def _anthropic(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)


def _response(client: openai.OpenAI, request: dict[str, Any], stream: bool, last_event: str) -> Any:
    """The answer of the Responses API, whole or as the last event of its stream has it."""
    if not stream:
        return client.responses.create(**request)
    *_, last = client.responses.create(**request, stream=True)
    assert last.type == last_event
    return last.response


def _thoughts(answer: Any) -> str:
    return "".join(part.text for item in answer.output if item.type == "reasoning" for part in item.content or [])


def _with(picture: dict[str, Any], results: tuple[Any, ...], text: str) -> list[Any]:
    """Results with their parts as another API has them. text: its name for text."""
    return [
        [picture if part is IMAGE else {**part, "type": text} for part in result]
        if isinstance(result, list)
        else result
        for result in results
    ]
