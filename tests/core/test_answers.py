"""Tests of what both adapters make of an answer: its events put together, its parser over text and token ids, and the
tools of a request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k26_plugins.common.adapters.answers import (
    REASONING_NAMES,
    Answer,
    CallPiece,
    Pieces,
    make_cut_calls_text,
    markers_are_ordinary,
    name_reasoning_twice,
    pieces,
    schemas,
)
from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer
from k26_plugins.common.prompt.output import CALL_ARGUMENTS, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, THINK_END
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

CALL = f"{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_ARGUMENTS}{{}}{CALL_END}{SECTION_END}"
WHOLE = Pieces("why", "so", [CallPiece(0, "functions.now:0", "now", "{}")])


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> KimiTokenizer:
    return KimiTokenizer(tiny_folder)


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_whole_answer(tokenizer: KimiTokenizer, with_ids: bool) -> None:
    text = f"why{THINK_END}so{CALL}"
    ids = tokenizer.encode_prompt(text) if with_ids else []
    answer = Answer(tokenizer, in_reasoning=True, tools={"now": {}})
    assert pieces(answer.feed(text, ids, finished=True)) == WHOLE


def test_a_streamed_answer_by_its_tokens(tokenizer: KimiTokenizer) -> None:
    """The first piece of a call has the call's name, and the later pieces only more of its arguments."""
    answer = Answer(tokenizer, in_reasoning=True, tools={"now": {}})
    text = f"why{THINK_END}so{CALL.replace('{}', '{ }')}"
    found = [
        pieces(answer.feed(tokenizer.decode([one]), [one], finished=False)) for one in tokenizer.encode_prompt(text)
    ]
    found.append(pieces(answer.feed("", [], finished=True)))
    first, *later = [call for one in found for call in one.calls]
    assert (first.call_id, first.name) == ("functions.now:0", "now")
    assert all((call.index, call.call_id, call.name) == (0, None, None) for call in later)
    assert "".join(call.arguments for call in (first, *later)) == "{ }"
    assert ("".join(one.reasoning for one in found), "".join(one.content for one in found)) == ("why", "so")


def test_a_quoted_marker_is_text_where_ids_say_so(tokenizer: KimiTokenizer) -> None:
    text = f"type {THINK_END}"
    answer = Answer(tokenizer, in_reasoning=True, tools=None)
    assert pieces(answer.feed(text, tokenizer.encode(text), finished=True)) == Pieces(text)


def test_tools_of_each_api_by_their_names() -> None:
    chat = SimpleNamespace(function=SimpleNamespace(name="a", parameters={"type": "object"}))
    response, without = SimpleNamespace(name="b", parameters=None), SimpleNamespace(name="c")
    assert schemas([chat, response, without, SimpleNamespace(type="web_search")]) == {
        "a": {"type": "object"},
        "b": {},
        "c": {},
    }


def test_markers_are_ordinary_to_the_cores_tokenizer_alone(tiny_folder: Path) -> None:
    ours = load_hf_tokenizer(tiny_folder)
    assert markers_are_ordinary(ours)
    assert not markers_are_ordinary(SimpleNamespace(all_special_tokens=[*ours.all_special_tokens, THINK_END]))


@pytest.mark.parametrize("name", REASONING_NAMES)
def test_reasoning_has_both_names(name: str) -> None:
    fields: dict[str, Any] = {"content": "so", name: "why"}
    name_reasoning_twice(fields)
    assert fields == {"content": "so", "reasoning": "why", "reasoning_content": "why"}
    name_reasoning_twice(without := {"content": "so", name: None})
    assert without == {"content": "so", name: None}


def test_cut_calls_become_text_and_whole_ones_stay() -> None:
    def call(arguments: str) -> SimpleNamespace:
        return SimpleNamespace(function=SimpleNamespace(arguments=arguments))

    whole = call("{}")
    message = SimpleNamespace(content="so", tool_calls=[call('{"a": '), whole, call("[1]")])
    make_cut_calls_text(message)
    assert (message.content, message.tool_calls) == ('so\n{"a": \n[1]', [whole])
    for kept in (SimpleNamespace(content=None, tool_calls=None), SimpleNamespace(content=None, tool_calls=[whole])):
        before = dict(vars(kept))
        make_cut_calls_text(kept)
        assert vars(kept) == before
