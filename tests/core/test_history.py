"""Tests of past messages as other clients and models leave them, and of what the model reads of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k26_plugins.common.prompt.chat import prepare, render
from k26_plugins.common.prompt.tool_ids import with_kimis_ids

USER: dict[str, Any] = {"role": "user", "content": "Hi"}


def call(id_: Any, name: str = "f") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}


def loop(id_: Any, **fields: Any) -> list[dict[str, Any]]:
    """Return a question, an assistant's message with one tool call, and the result of that call."""
    answer = {"role": "assistant", "content": "", "tool_calls": [call(id_)], **fields}
    return [USER, answer, {"role": "tool", "tool_call_id": id_, "content": "42"}]


def ids(prompt: str) -> list[tuple[str, str]]:
    """Return the tool-call ids of a rendered prompt in their order: (id, "") for a call and ("", id) for a result."""
    return re.findall(r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>|## Return of (.*)\n", prompt)


@pytest.mark.parametrize(
    "id_", ["call_9f", "toolu_01A", "3f2b7f0e-0c4b-4b9c-9d0a-6d5f0f6c1a11", "f:0", "functions.g:0", "7"]
)
def test_an_id_of_another_kind_becomes_kimis(id_: Any) -> None:
    assert ids(render(loop(id_))) == [("functions.f:0", ""), ("", "functions.f:0")]


def test_indices_count_over_the_conversation() -> None:
    """Indices count over the conversation even if ids repeat, as with engines that count from 0 in each answer."""
    both = {"role": "assistant", "content": "", "tool_calls": [call("call_0"), call("call_1", "g.h-i")]}
    results = [{"role": "tool", "tool_call_id": id_, "content": "r"} for id_ in ("call_1", "call_0")]
    found = ids(render([*loop("call_0"), both, *results]))
    assert [one or other for one, other in found] == [
        "functions.f:0", "functions.f:0", "functions.f:1", "functions.g.h-i:2", "functions.g.h-i:2", "functions.f:1",
    ]  # fmt: skip


def test_kimis_own_ids_stay() -> None:
    messages = [*loop("functions.f:1"), *loop("call_x"), *loop("functions.f:7")]
    found = [one or other for one, other in ids(render(messages))]
    # The second call would have index 1, which is taken.
    assert found == [name for name in ("functions.f:1", "functions.f:2", "functions.f:7") for _ in range(2)]
    assert with_kimis_ids(loop("functions.f:3")) == loop("functions.f:3")


def test_ids_stay_where_that_is_asked_for() -> None:
    assert prepare(loop("call_9f"), None, kimis_ids=False).messages[2]["tool_call_id"] == "call_9f"


def test_a_result_without_a_call_or_without_an_id() -> None:
    orphan = {"role": "tool", "tool_call_id": "call_gone", "content": "42"}
    assert "## Return of call_gone\n42" in render([USER, orphan])
    for nothing in ({"role": "tool", "content": "42"}, {"role": "tool", "tool_call_id": None, "content": "42"}):
        assert "## Return of \n42" in render([USER, nothing])


NAMES = st.sampled_from(["f", "g", "a.b", "f:0"])
IDS = st.sampled_from(["call_1", "call_2", "functions.f:0", "functions.g:1", "functions.a.b:0", "1", "", None])
CALLS = st.lists(st.tuples(IDS, NAMES), max_size=3)


@settings(deadline=None)
@given(st.lists(CALLS, max_size=5))
def test_any_history_has_ids_of_kimis_form(turns: list[list[tuple[Any, str]]]) -> None:
    """Every call gets an id of Kimi's form, and a result directly after its call has its call's id."""
    messages: list[dict[str, Any]] = [USER]
    for turn in turns:
        for id_, name in turn:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call(id_, name)]})
            messages.append({"role": "tool", "tool_call_id": id_, "content": "r"})
    found = with_kimis_ids(messages)
    for sent, asked, result in zip(messages[2::2], found[1::2], found[2::2], strict=True):
        made = asked["tool_calls"][0]
        assert re.fullmatch(rf"functions\.{re.escape(made['function']['name'])}:\d+", made["id"])
        if sent["tool_call_id"] is not None:
            assert result["tool_call_id"] == made["id"]


def test_instant_mode_shows_no_thoughts_of_the_tool_loop() -> None:
    messages = loop("functions.f:0", reasoning="RRR")
    assert "<think>RRR</think>" in render(messages)
    assert "RRR" not in render(messages, thinking=False)
    assert "<think>RRR</think>" in render(messages, thinking=False, preserve_thinking=True)


def test_thoughts_among_an_answers_parts() -> None:
    """Clients of the Messages API send thoughts back as content parts of type `thinking`."""
    parts = [{"type": "thinking", "thinking": "TTT"}, {"type": "text", "text": "said"}]
    messages = loop("functions.f:0", content=parts)
    assert "<think>TTT</think>said<|tool_calls_section_begin|>" in render(messages)
    assert "<think>RRR</think>said" in render(loop("functions.f:0", content=parts, reasoning="RRR"))


@pytest.mark.parametrize("part", [{"type": "input_audio", "input_audio": {}}, {"type": "text"}, {}, "text", None])
def test_an_unknown_part_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="has a content part of type"):
        render([{"role": "user", "content": [part]}])
