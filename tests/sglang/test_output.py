"""Tests of the core's state machine behind SGLang's interface of tool-call parsers: whole answers, and streams that are
cut anywhere."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from support.grammar import accepts
from support.scripted import CASES, TOKEN_CASES, TOOLS, WEATHER, Case, call

from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer
from k26_plugins.common.prompt.output import SECTION_BEGIN, SECTION_END, THINK_END
from k26_plugins.sglang import compat, compat_chats, names
from k26_plugins.sglang.answers import K26Answers, is_thinking
from k26_plugins.sglang.output import K26ToolDetector
from k26_plugins.sglang.serving import allow_calls, hear_thinking, join_turns, keep_images, read_token_ids

BIG = '{"city":"' + 'x } \\" <| ' * 1500 + '"}'
ALL = {
    **CASES,
    "12-kilobytes": Case(f"{THINK_END}{SECTION_BEGIN}{call('now:0', BIG)}{SECTION_END}", "", "", [("now", BIG)]),
}


@pytest.mark.parametrize("name", ALL)
def test_whole_and_streamed(name: str) -> None:
    case = ALL[name]
    # The reasoning parser has already taken its part of the text.
    text = case.answer.removeprefix(case.reasoning).removeprefix(THINK_END)
    tools = [Tool(**tool) for tool in TOOLS]
    whole = K26ToolDetector().detect_and_parse(text, tools)
    assert (whole.normal_text, [(item.name, item.parameters) for item in whole.calls]) == (case.content, case.calls)
    for seed in range(10):
        rng, rest, detector = random.Random(seed), text, K26ToolDetector()
        content = ""
        calls: dict[int, Any] = {}
        pieces = []
        while rest:
            size = rng.choice([1, 2, 7, 40, 3000])
            pieces.append(rest[:size])
            rest = rest[size:]
        for result in [*(detector.parse_streaming_increment(piece, tools) for piece in pieces), detector.finish(tools)]:
            content += result.normal_text
            for item in result.calls:
                found, arguments = calls.get(item.tool_index, ("", ""))
                calls[item.tool_index] = (found + (item.name or ""), arguments + item.parameters)
        assert (content, list(calls.values())) == (case.content, case.calls)
        assert detector.streamed_args_for_tool == [arguments for _, arguments in case.calls]


def test_it_takes_the_place_of_sglangs_own() -> None:
    original = FunctionCallParser.ToolCallParserEnum["kimi_k2"]
    changes = Registration()
    compat.replace_tool_detector(changes, "kimi_k2", "k26_plugins.sglang.output", "K26ToolDetector")
    try:
        changes.apply()
        parser = FunctionCallParser([Tool(**tool) for tool in TOOLS], "kimi_k2")
        assert isinstance(parser.detector, K26ToolDetector)
    finally:
        FunctionCallParser.ToolCallParserEnum["kimi_k2"] = original


def test_a_functions_images_are_kept_by_the_responses_api() -> None:
    serving = pytest.importorskip("sglang.srt.entrypoints.openai.serving_responses").OpenAIServingResponses
    original = serving.__dict__["_flatten_tool_output"]
    url = "data:image/png;base64,aGVsbG8="
    output = [{"type": "input_text", "text": "Seen:"}, {"type": "input_image", "image_url": url}]
    result = {"type": "function_call_output", "call_id": "now:0", "output": output}
    changes = Registration()
    compat_chats.hook(changes, names.RESPONSES_RESULT, keep_images, "images are dropped")
    try:
        changes.apply()
        message = serving._normalize_response_message_for_chat(result)
        text, image = message["content"]
        assert (message["role"], message["tool_call_id"]) == ("tool", "now:0")
        assert text == {"type": "text", "text": "Seen:"}
        assert (image["type"], image["image_url"]["url"]) == ("image_url", url)
        for plain in ("Seen:", output[:1]):
            assert serving._normalize_response_message_for_chat({**result, "output": plain})["content"] == "Seen:"
    finally:
        serving._flatten_tool_output = original


def test_an_answer_of_the_responses_api_stays_one_message() -> None:
    """An answer stays one message whatever phase its text has, because text that is separated from its calls would lose
    the reasoning."""
    serving = pytest.importorskip("sglang.srt.entrypoints.openai.serving_responses").OpenAIServingResponses
    name = "_merge_consecutive_assistant_messages"
    original, changes = serving.__dict__.get(name), Registration()
    compat_chats.hook(changes, names.RESPONSES_TURNS, join_turns, "turns stay apart")
    if original is None:
        pytest.skip("this SGLang joins nothing")
    call_ = {"id": "now:0", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    parts: list[dict[str, Any]] = [
        {"reasoning_content": "why"},
        {"content": "ok", "phase": "commentary"},
        {"tool_calls": [call_]},
    ]
    try:
        changes.apply()
        for owner in (serving, object.__new__(serving)):
            (message,) = getattr(owner, name)([{"role": "assistant", **part} for part in parts])
            assert message == {"role": "assistant", "reasoning_content": "why", "content": "ok", "tool_calls": [call_]}
    finally:
        setattr(serving, name, original)


class Serving:
    """SGLang's own `OpenAIServingChat`, of which only what parses answers is set up."""

    def __new__(cls, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        pytest.importorskip("sglang.srt.entrypoints.openai.chat_encoding_adapters")
        chats = importlib.import_module("sglang.srt.entrypoints.openai.serving_chat").OpenAIServingChat
        if not hasattr(chats, "_encoding_output"):
            pytest.skip("before 0.5.23 SGLang's parsers get the text alone")
        monkeypatch.setattr(compat_chats, "sends_increments", lambda: False)
        serving = object.__new__(chats)
        serving.tokenizer_manager = SimpleNamespace(tokenizer=load_hf_tokenizer(tiny_folder))
        serving.tool_call_parser = serving.reasoning_parser = "kimi_k2"
        serving._encoding_adapter = None
        return serving


def asked(**fields: Any) -> Any:
    protocol = importlib.import_module("sglang.srt.entrypoints.openai.protocol")
    return protocol.ChatCompletionRequest(
        **{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields}
    )


def streamed(answers: Any, tokenizer: Any, request: Any, token_ids: list[int], sizes: list[int], stop: str) -> Any:
    """Return the reasoning, content and calls as a client puts them together from the streaming chunks.

    Each chunk that SGLang hands to `answers` holds all the text so far.
    """
    reasoning, content, end = "", "", 0
    calls, parsers, called = dict[Any, Any](), dict[Any, Any](), dict[Any, Any]()
    turn = itertools.cycle(sizes)
    while end < len(token_ids):
        end = min(len(token_ids), end + next(turn))
        finish = stop if end == len(token_ids) else None
        meta = {"id": "i", "completion_tokens": end, "finish_reason": finish and {"type": finish}}
        text = tokenizer.decode(token_ids[:end], skip_special_tokens=True).rstrip("\ufffd")
        chunk = {"text": text, "output_ids": token_ids, "meta_info": meta}
        events = answers.stream_chat_chunks(
            content=chunk, index=0, request=request, created=0, parser_dict=parsers, has_tool_calls=called,
            choice_logprobs=None, finish_reason_type=finish, usage=None,
        )  # fmt: skip
        for delta in (json.loads(event[6:])["choices"][0]["delta"] for event in events):
            assert delta.get("reasoning") == delta.get("reasoning_content")
            reasoning += delta.get("reasoning") or ""
            content += delta.get("content") or ""
            for piece in delta.get("tool_calls") or []:
                name, arguments = calls.get(piece["index"], ("", ""))
                function = piece["function"]
                calls[piece["index"]] = (name + (function["name"] or ""), arguments + (function["arguments"] or ""))
    assert called.get(0, False) == bool(calls)
    return reasoning, content, list(calls.values())


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_by_token_ids(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case, serving = TOKEN_CASES[name], Serving(tiny_folder, monkeypatch)
    answers = read_token_ids(lambda serving: None, serving)
    tokenizer = serving.tokenizer_manager.tokenizer
    end = tokenizer.plain.special["<|im_end|>"]
    token_ids = [*tokenizer.plain.encode_prompt(case.answer), end]
    for finish, reason in (({"type": "stop", "matched": end}, "tool_calls"), ({"type": "length"}, "length")):
        reasoning, content, calls, finish = answers.parse_chat_response(
            request=asked(), output_ids=token_ids, finish_reason=finish
        )
        found = [(call.function.name, call.function.arguments) for call in calls or []]
        assert (reasoning or "", content, found) == (case.reasoning, case.content, case.calls)
        assert finish["type"] == (reason if case.calls or reason == "length" else "stop")
        assert [call.id for call in calls or []] == [f"functions.{one}:{place}" for place, (one, _) in enumerate(found)]
    for sizes in ([1], [2, 1, 7], [1000]):
        expected = (case.reasoning, case.content, case.calls)
        assert streamed(answers, tokenizer, asked(), token_ids, sizes, "stop") == expected


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": None}], ids=str)
def test_no_call_where_none_is_asked_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    case, serving = CASES["call"], Serving(tiny_folder, monkeypatch)
    answers, tokenizer = K26Answers(serving), serving.tokenizer_manager.tokenizer
    token_ids = tokenizer.plain.encode_prompt(case.answer)
    whole = answers.parse_chat_response(
        request=asked(**fields), output_ids=token_ids, finish_reason={"type": "stop", "matched": None}
    )
    assert whole[:3] == ("why", "ok", None)
    assert streamed(answers, tokenizer, asked(**fields), token_ids, [1], "stop") == ("why", "ok", [])


def test_what_a_request_asks_of_its_reasoning(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(tiny_folder, monkeypatch)
    answers, tokenizer = K26Answers(serving), serving.tokenizer_manager.tokenizer
    token_ids = tokenizer.plain.encode_prompt("why</think>oZ")

    def parsed(**fields: Any) -> Any:
        request, finish = asked(**fields), {"type": "stop", "matched": "Z"}
        return answers.parse_chat_response(request=request, output_ids=token_ids, finish_reason=finish)[:2]

    # The text ends in front of the stop string that ended the answer.
    assert parsed() == ("why", "o")
    assert parsed(no_stop_trim=True) == ("why", "oZ")
    assert parsed(separate_reasoning=False) == (None, "why</think>o")
    assert parsed(chat_template_kwargs={"thinking": False}) == (None, "whyo")
    continued = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert parsed(messages=continued, continue_final_message=True) == (None, "whyo")
    request = asked(stream_reasoning=False)
    assert streamed(answers, tokenizer, request, token_ids, [1], "stop") == ("why", "oZ", [])


def test_with_a_schema_calls_are_possible(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(tiny_folder, monkeypatch)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for format_, answer in (
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, '{"a":1}'),
        ({"type": "json_object"}, "{}"),
    ):
        request, processed = asked(response_format=format_), SimpleNamespace(tool_call_constraint=None)
        allow_calls(serving, request, processed)
        parameters = request.to_sampling_params([], {}, processed.tool_call_constraint)
        assert not parameters.get("json_schema")
        tag = json.loads(parameters["structural_tag"])
        assert accepts(tag, answer)
        assert accepts(tag, f"{SECTION_BEGIN}{call('functions.now:0', WEATHER)}{SECTION_END}")
        assert not accepts(tag, "text")
        none = asked(response_format=format_, tool_choice="none")
        allow_calls(serving, none, processed)
        assert none.response_format.type == format_["type"]


def test_another_parser_is_sglangs(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(tiny_folder, monkeypatch)
    serving.tool_call_parser = "qwen"
    assert read_token_ids(lambda serving: "its own", serving) == "its own"


@pytest.mark.parametrize(
    ("sent", "thinking"),
    [
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, True),
        ({"chat_template_kwargs": {"thinking": 0}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({"reasoning_effort": "none"}, False),
        ({}, True),
    ],
    ids=str,
)
def test_thinking_is_what_the_client_said(sent: dict[str, Any], thinking: bool) -> None:
    # The fields are copied because SGLang writes into what it is given.
    request = asked(**{name: value for name, value in copy.deepcopy(sent).items() if name != "thinking"})
    hear_thinking(request, sent)
    assert is_thinking(request) == thinking
