"""The answer's state machine: the same events for every way of cutting the text, and the faults parsers are known for."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k26_plugins.common.prompt.output import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    SECTION_BEGIN,
    SECTION_END,
    THINK_BEGIN,
    THINK_END,
    CallArguments,
    CallStart,
    Content,
    OutputParser,
    Reasoning,
)

TOOLS = {"get_weather": ["city"], "search": ["query", "limit"], "now": []}
Answer = tuple[str, str, list[tuple[str, str, str]]]


def call(call_id: str, arguments: str) -> str:
    return f"{CALL_BEGIN}{call_id}{CALL_ARGUMENTS}{arguments}{CALL_END}"


def parse(pieces: list[str], in_reasoning: bool = True, tools: Any = TOOLS) -> Answer:
    """(reasoning, content, calls of id, name, arguments)."""
    parser = OutputParser(in_reasoning=in_reasoning, parameters=tools)
    reasoning, content, calls = "", "", []
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        match event:
            case Reasoning(text):
                reasoning += text
            case Content(text):
                content += text
            case CallStart(index, call_id, name):
                assert index == len(calls)
                calls.append((call_id, name, ""))
            case CallArguments(index, text):
                call_id, name, arguments = calls[index]
                calls[index] = (call_id, name, arguments + text)
    return reasoning, content, calls


WEATHER = ("functions.get_weather:0", "get_weather", '{"city":"Bern"}')
LONG = json.dumps({"city": 'x\n"é<|' * 4000}, ensure_ascii=False)
CASES: dict[str, tuple[str, Answer]] = {
    "content": ("why</think>hello", ("why", "hello", [])),
    "thinking-only": ("why not", ("why not", "", [])),
    "content-and-call": (
        f"why\n</think>ok{SECTION_BEGIN}{call(WEATHER[0], WEATHER[2])}{SECTION_END}",
        ("why", "ok", [WEATHER]),
    ),
    "no-end-of-thinking": (f"why{SECTION_BEGIN}{call(WEATHER[0], WEATHER[2])}{SECTION_END}", ("why", "", [WEATHER])),
    "dots-and-hyphens": (
        f"</think>{SECTION_BEGIN}{call('functions.search.web-v2:12', '{}')}{SECTION_END}",
        ("", "", [("functions.search.web-v2:12", "search.web-v2", "{}")]),
    ),
    "colons": (
        f"</think>{SECTION_BEGIN}{call('functions.mcp:a:3', '{}')}{SECTION_END}",
        ("", "", [("functions.mcp:a:3", "mcp:a", "{}")]),
    ),
    "without-prefix": (
        f"</think>{SECTION_BEGIN}{call('now:1', '{}')}{SECTION_END}",
        ("", "", [("now:1", "now", "{}")]),
    ),
    "empty-arguments": (
        f"</think>{SECTION_BEGIN}{call('functions.now:0', '')}{call('functions.now:1', ' ')}{SECTION_END}",
        ("", "", [("functions.now:0", "now", "{}"), ("functions.now:1", "now", "{}")]),
    ),
    "white-space": (
        f"</think>\n{SECTION_BEGIN}\n{call(' functions.get_weather:0 ', WEATHER[2] + chr(10))}\n{SECTION_END}\n",
        ("", "", [WEATHER]),
    ),
    "braces-in-a-string": (
        f"</think>{SECTION_BEGIN}{call('functions.get_weather:0', LONG)}{SECTION_END}",
        ("", "", [("functions.get_weather:0", "get_weather", LONG)]),
    ),
    "cut-arguments": (
        f'</think>{SECTION_BEGIN}{CALL_BEGIN}functions.get_weather:0{CALL_ARGUMENTS}{{"city":"Be',
        ("", "", [("functions.get_weather:0", "get_weather", '{"city":"Be')]),
    ),
    "cut-header": (f"</think>a{SECTION_BEGIN}{CALL_BEGIN}functions.get_wea", ("", "a", [])),
    "number-only": (
        f"</think>{SECTION_BEGIN}{call('3', WEATHER[2])}{call('4', '[]')}{SECTION_END}",
        ("", "", [("3", "get_weather", WEATHER[2])]),
    ),
    "no-end-of-call": (
        f"</think>{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_ARGUMENTS}{SECTION_END}",
        ("", "", [("functions.now:0", "now", "{}")]),
    ),
    "call-in-a-header": (
        f"</think>{SECTION_BEGIN}{CALL_BEGIN}functions.x{call(WEATHER[0], WEATHER[2])}{SECTION_END}",
        ("", "", [WEATHER]),
    ),
    "text-that-looks-like-a-marker": (
        "a < b</think>x <|tool_calls <think> y <",
        ("a < b", "x <|tool_calls <think> y <", []),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_however_it_is_cut(name: str) -> None:
    text, expected = CASES[name]
    assert parse([text]) == expected
    assert parse(list(text)) == expected
    for seed in range(20):
        rng, rest, pieces = random.Random(seed), text, []
        while rest:
            size = rng.choice([1, 2, 5, 17, 60, 4000])
            pieces.append(rest[:size])
            rest = rest[size:]
        assert parse(pieces) == expected


def test_instant_mode_begins_with_content() -> None:
    assert parse(["hello"], in_reasoning=False) == ("", "hello", [])


def test_one_tool_needs_no_name() -> None:
    text = f"{SECTION_BEGIN}{call('0', '')}{SECTION_END}"
    assert parse([text], in_reasoning=False, tools={"now": []}) == ("", "", [("0", "now", "{}")])


PIECES = st.sampled_from(
    [THINK_BEGIN, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END, "functions.now:0", "7",
     '{"city": 1}', " ", "\n", "<", "<|tool_call", "text", "|>"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=20).map("".join), st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=9))
@settings(deadline=None, max_examples=500)
def test_no_text_and_no_cut_breaks_it(text: str, in_reasoning: bool, sizes: list[int]) -> None:
    pieces, position, turn = [], 0, 0
    while position < len(text):
        size = sizes[turn % len(sizes)]
        pieces.append(text[position : position + size])
        position, turn = position + size, turn + 1
    assert parse(pieces, in_reasoning) == parse([text], in_reasoning)
