"""Tests of the state machine that parses an answer: it gives the same events however the text is cut, and it does not
have the faults that such parsers are known for."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k26_plugins.common.prompt.call_names import Tools, is_object
from k26_plugins.common.prompt.output import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    MARKERS,
    SECTION_BEGIN,
    SECTION_END,
    THINK_BEGIN,
    THINK_END,
    CallArguments,
    CallStart,
    Content,
    Event,
    Marker,
    OutputParser,
    Reasoning,
)
from k26_plugins.common.prompt.token_text import TokenText
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

TOOLS: Tools = {
    "get_weather": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "search": {"type": "object", "properties": {"query": {}, "limit": {}}, "required": ["query"]},
    "now": {},
    "srv:read": {"properties": {"path": {}}, "required": ["path"]},
}
Answer = tuple[str, str, list[tuple[str, str, str]]]


def call(call_id: str, arguments: str) -> str:
    return f"{CALL_BEGIN}{call_id}{CALL_ARGUMENTS}{arguments}{CALL_END}"


def parse(pieces: list[str], in_reasoning: bool = True, tools: Tools | None = TOOLS) -> Answer:
    """Return an answer parsed by its text alone, as (reasoning, content, calls), where a call is (id, name,
    arguments)."""
    parser = OutputParser(in_reasoning=in_reasoning, tools=tools)
    return collected([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


def collected(events: list[Event]) -> Answer:
    reasoning, content = "", ""
    calls: list[Any] = []
    for event in events:
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
TAGS = '"<think></think>"'
FOREIGN = '{"a":1}'
LONG = json.dumps({"city": 'x\n"é<|' * 1000}, ensure_ascii=False)
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
        ("", "4 []", [("functions.get_weather:3", "get_weather", WEATHER[2])]),
    ),
    "without-index": (
        f"</think>{SECTION_BEGIN}{call('functions.now', '')}{call('srv:read', '{}')}{SECTION_END}",
        ("", "", [("functions.now:0", "now", "{}"), ("functions.srv:read:1", "srv:read", "{}")]),
    ),
    "another-kind-of-id": (
        f"</think>ok{SECTION_BEGIN}{call('call_6b', WEATHER[2])}{call('3f2b-7f0e', '{}')}{call('call_7', FOREIGN)}",
        ("", 'ok\ncall_7 {"a":1}', [WEATHER, ("functions.now:1", "now", "{}")]),
    ),
    "several-fit": (
        f"</think>{SECTION_BEGIN}{call('7', 'null')}{call('8', '{')}{SECTION_END}",
        ("", "7 null\n8 {", []),
    ),
    "one-id-twice": (
        f"</think>{SECTION_BEGIN}{2 * call('functions.now:0', '{}')}{call('functions.now:1', '{}')}{SECTION_END}",
        ("", "", [(f"functions.now:{index}", "now", "{}") for index in range(3)]),
    ),
    "thinking-ends-behind-a-section": (
        f"why{SECTION_BEGIN}{call(WEATHER[0], WEATHER[2])}{SECTION_END}</think>ok",
        ("why", "ok", [WEATHER]),
    ),
    "thinking-ends-in-a-section": (f"why{SECTION_BEGIN}{CALL_BEGIN}x</think>ok", ("why", "ok", [])),
    "no-section": (f"why</think>ok{call(*WEATHER[::2])}", ("why", "ok", [WEATHER])),
    "no-section-in-thinking": (f"why{call(*WEATHER[::2])}", ("why", "", [WEATHER])),
    "orphan-end-of-section": (f"why{CALL_END}</think>o{SECTION_END}k{CALL_ARGUMENTS}", ("why", "ok", [])),
    "no-end-of-the-first-call": (
        f"</think>{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_ARGUMENTS}{{}}{call('functions.now:1', '')}{SECTION_END}",
        ("", "", [("functions.now:0", "now", "{}"), ("functions.now:1", "now", "{}")]),
    ),
    "no-arguments-at-all": (
        f"</think>{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_END}{SECTION_END}",
        ("", "", [("functions.now:0", "now", "{}")]),
    ),
    "cut-before-arguments": (f"</think>a{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_ARGUMENTS} ", ("", "a", [])),
    "cut-without-a-name": (f'</think>{SECTION_BEGIN}{CALL_BEGIN}7{CALL_ARGUMENTS}{{"ci', ("", '7 {"ci', [])),
    "tags-in-arguments": (
        f"</think>{SECTION_BEGIN}{call('functions.now:0', TAGS)}{SECTION_END}",
        ("", "", [("functions.now:0", "now", TAGS)]),
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
    assert parse([text], in_reasoning=False, tools={"now": {}}) == ("", "", [("functions.now:0", "now", "{}")])


def test_calls_that_nobody_asked_for_are_dropped() -> None:
    for text, (reasoning, content, _) in CASES.values():
        before = content.partition("\ncall_7")[0] if "call_7" in text else "" if "\n8 " in content else content
        found = parse([text], tools=None)
        assert (found[0], found[2]) == (reasoning, [])
        assert found[1] == before.removeprefix("4 []").removeprefix('7 {"ci')


def test_an_answer_in_a_section_is_content_where_no_calls_are_asked_for() -> None:
    """vLLM starts a grammar of the content at the section's marker, so the text behind that marker is the answer's
    content."""
    assert parse([f"why{SECTION_BEGIN}", '{"a": 1}'], tools=None) == ("why", '{"a": 1}', [])


PIECES = st.sampled_from(
    [THINK_BEGIN, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END, "functions.now:0", "7",
     "now", '{"city": 1}', '{"city":', "1}", " ", "\n", "<", "<|tool_call", "text", "|>", "é"]
)  # fmt: skip
PLAIN = st.text(alphabet="ab \n{}:é", max_size=8)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=9)


def cut(whole: Sequence[Any], sizes: list[int]) -> list[Any]:
    pieces, position, turn = [], 0, 0
    while position < len(whole):
        size = sizes[turn % len(sizes)]
        pieces.append(whole[position : position + size])
        position, turn = position + size, turn + 1
    return pieces


@given(st.lists(PIECES, max_size=20).map("".join), st.booleans(), SIZES)
@settings(deadline=None, max_examples=500)
def test_no_text_and_no_cut_breaks_it(text: str, in_reasoning: bool, sizes: list[int]) -> None:
    assert parse(cut(text, sizes), in_reasoning) == parse([text], in_reasoning)


@given(st.lists(st.one_of(st.sampled_from(MARKERS), PLAIN), max_size=20).map("".join), st.booleans())
@settings(deadline=None, max_examples=500)
def test_no_order_of_markers_shows_one(text: str, in_reasoning: bool) -> None:
    """No marker is shown except the tags of thinking, in the two cases in which the text alone cannot tell a tag from a
    quoted one."""
    reasoning, content, calls = parse([text], in_reasoning)
    markers = [marker for marker in MARKERS if marker not in (THINK_BEGIN, THINK_END)]
    assert not [marker for marker in markers if marker in reasoning + content + "".join(map(str, calls))]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> KimiTokenizer:
    return KimiTokenizer(tiny_folder)


def parse_ids(
    tokenizer: KimiTokenizer, token_ids: list[int], sizes: list[int], *, lag: int = 0, in_reasoning: bool = True
) -> Answer:
    """Return an answer parsed by its token ids, given some at a time. Their text comes `lag` characters late, as from
    an engine that waits for a stop string.

    The text is that of the ids without the special tokens that the parser has no use for.
    """
    hidden = set(tokenizer.special.values()) - {tokenizer.special[name] for name in MARKERS}
    text_of, parser = TokenText(tokenizer), OutputParser(in_reasoning=in_reasoning, tools=TOOLS)
    decoder, events, waiting = codecs.getincrementaldecoder("utf-8")("replace"), [], ""
    for piece in cut(token_ids, sizes):
        waiting += "".join(decoder.decode(tokenizer.token_bytes(one)) for one in piece if one not in hidden)
        ready = max(0, len(waiting) - lag)
        events += parser.feed_pieces(text_of.split(waiting[:ready], piece))
        waiting = waiting[ready:]
    events += parser.feed_pieces([*text_of.split(waiting, []), *text_of.finish()])
    return collected(events + parser.finish())


@pytest.mark.parametrize("name", CASES)
def test_by_token_ids_as_by_text(tokenizer: KimiTokenizer, name: str) -> None:
    text, expected = CASES[name]
    if name == "tags-in-arguments":
        expected = ("", "", [("functions.now:0", "now", '""')])
    if name == "text-that-looks-like-a-marker":
        text = text.replace(THINK_BEGIN, "")
        expected = parse([text])
    token_ids = tokenizer.encode_prompt(text)
    for sizes in ([len(token_ids)], [1], [2, 1, 5]):
        for lag in (0, 7, 40):
            assert parse_ids(tokenizer, token_ids, sizes, lag=lag) == expected


@given(st.data(), SIZES, st.integers(0, 30), st.booleans())
@settings(deadline=None, max_examples=200)
def test_by_token_ids_any_cut_is_the_whole_and_no_marker_is_shown(
    tokenizer: KimiTokenizer, data: st.DataObject, sizes: list[int], lag: int, in_reasoning: bool
) -> None:
    """Each piece is encoded by itself, so only a piece that is a whole control token is a marker. Reserved tokens lie
    anywhere."""
    parts = data.draw(st.lists(st.one_of(PIECES, st.just("<|reserved_token_300|>")), max_size=20))
    token_ids = [token_id for part in parts for token_id in tokenizer.encode_prompt(part)]
    whole = parse_ids(tokenizer, token_ids, [max(1, len(token_ids))], in_reasoning=in_reasoning)
    assert parse_ids(tokenizer, token_ids, sizes, lag=lag, in_reasoning=in_reasoning) == whole
    if "<|tool_call" not in parts:
        assert not [marker for marker in MARKERS if marker in str(whole)]


@given(st.lists(st.one_of(st.sampled_from([*MARKERS, "[PAD]", "[EOS]", "<|im_end|>"]), PLAIN), max_size=8), SIZES)
@settings(deadline=None, max_examples=200)
def test_what_is_spelled_by_ordinary_tokens_survives(
    tokenizer: KimiTokenizer, parts: list[str], sizes: list[int]
) -> None:
    """Markers that ordinary tokens spell survive in reasoning content, in content and in arguments, so a quoted call is
    no call."""
    said = "".join(parts)
    quoted = f"x{said}x"
    token_ids = [
        *tokenizer.encode(quoted), *tokenizer.encode_prompt(THINK_END), *tokenizer.encode(quoted),
        *tokenizer.encode_prompt(f"{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_ARGUMENTS}"),
        *tokenizer.encode(quoted), *tokenizer.encode_prompt(CALL_END + SECTION_END),
    ]  # fmt: skip
    expected = (quoted, quoted, [("functions.now:0", "now", quoted)])
    assert parse_ids(tokenizer, token_ids, sizes) == expected


@given(st.lists(st.one_of(st.sampled_from(MARKERS), PLAIN), max_size=12), st.data(), SIZES, st.integers(0, 30))
@settings(deadline=None, max_examples=200)
def test_raw_text_shows_no_marker_and_all_that_spells_one(
    tokenizer: KimiTokenizer, parts: list[str], data: st.DataObject, sizes: list[int], lag: int
) -> None:
    """`/v1/completions` answers with raw text. However the text is streamed, its pieces add up to the whole, which has
    no marker that is a control token and every marker that ordinary tokens spell."""
    meant = [part in MARKERS and data.draw(st.booleans()) for part in parts]
    token_ids = [
        token_id
        for part, one in zip(parts, meant, strict=True)
        for token_id in (tokenizer.encode_prompt(part) if one else tokenizer.encode(part))
    ]
    said = "".join(part for part, one in zip(parts, meant, strict=True) if not one)
    assert TokenText(tokenizer).shown(tokenizer.decode(token_ids), token_ids, finished=True) == said
    text_of, decoder, waiting, shown = TokenText(tokenizer), codecs.getincrementaldecoder("utf-8")(), "", ""
    for piece in cut(token_ids, sizes):
        waiting += "".join(decoder.decode(tokenizer.token_bytes(one)) for one in piece)
        ready = max(0, len(waiting) - lag)
        shown += text_of.shown(waiting[:ready], piece, finished=False)
        waiting = waiting[ready:]
    assert shown + text_of.shown(waiting, [], finished=True) == said


def test_a_model_may_open_the_block_itself(tokenizer: KimiTokenizer) -> None:
    """With a user's own template the model opens the think block itself. Later in the answer the tag has no meaning."""
    token_ids = tokenizer.encode_prompt(f"{THINK_BEGIN}why{THINK_END}so{THINK_BEGIN}me")
    assert parse_ids(tokenizer, token_ids, [1], in_reasoning=False) == ("why", "some", [])


def test_names_of_special_tokens_that_are_shown_part_a_spelled_marker(tokenizer: KimiTokenizer) -> None:
    """A client that asks for special tokens sees their names. If the pad token were hidden, the two halves around it
    would spell a marker."""
    halves = [tokenizer.encode("<|tool_call"), tokenizer.encode("_end|>")]
    token_ids = [*halves[0], tokenizer.special["[PAD]"], *halves[1], tokenizer.special[CALL_END]]
    shown = TokenText(tokenizer, special_shown=True).split(tokenizer.decode(token_ids), token_ids)
    assert shown == ["<|tool_call[PAD]_end|>", CALL_END]
    assert [isinstance(piece, Marker) for piece in shown] == [False, True]
    hidden = TokenText(tokenizer).split(f"{CALL_END}{CALL_END}", token_ids)
    assert [(piece, isinstance(piece, Marker)) for piece in hidden] == [(CALL_END, False), (CALL_END, True)]


def test_arguments_that_every_api_takes() -> None:
    assert not any(map(is_object, ["", "{", "[]", "null", "1", "[" * 100_000]))
    assert is_object(json.dumps({"a": 1}))
