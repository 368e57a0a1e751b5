"""SGLang's interface of tool-call parsers on the core's state machine: whole answers, and streams cut anywhere."""

from __future__ import annotations

import random

import pytest
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from support.scripted import CASES, TOOLS, Case, call

from k26_plugins.common.prompt.output import SECTION_BEGIN, SECTION_END, THINK_END
from k26_plugins.sglang import compat
from k26_plugins.sglang.output import K26ToolDetector
from k26_plugins.sglang.serving import keep_images

BIG = '{"city":"' + 'x } \\" <| ' * 1500 + '"}'
ALL = {
    **CASES,
    "12-kilobytes": Case(f"{THINK_END}{SECTION_BEGIN}{call('now:0', BIG)}{SECTION_END}", "", "", [("now", BIG)]),
}


@pytest.mark.parametrize("name", ALL)
def test_whole_and_streamed(name: str) -> None:
    case = ALL[name]
    # The reasoning parser has taken its part before.
    text = case.answer.removeprefix(case.reasoning).removeprefix(THINK_END)
    tools = [Tool(**tool) for tool in TOOLS]
    whole = K26ToolDetector().detect_and_parse(text, tools)
    assert (whole.normal_text, [(item.name, item.parameters) for item in whole.calls]) == (case.content, case.calls)
    for seed in range(10):
        rng, rest, detector = random.Random(seed), text, K26ToolDetector()
        content, calls = "", {}
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
    try:
        compat.replace_tool_detector("kimi_k2", "k26_plugins.sglang.output", "K26ToolDetector")
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
    try:
        compat.hook_responses("OpenAIServingResponses._flatten_tool_output", keep_images)
        message = serving._normalize_response_message_for_chat(result)
        text, image = message["content"]
        assert (message["role"], message["tool_call_id"]) == ("tool", "now:0")
        assert text == {"type": "text", "text": "Seen:"}
        assert (image["type"], image["image_url"]["url"]) == ("image_url", url)
        for plain in ("Seen:", output[:1]):
            assert serving._normalize_response_message_for_chat({**result, "output": plain})["content"] == "Seen:"
    finally:
        serving._flatten_tool_output = original
