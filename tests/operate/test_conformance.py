"""Tests that every case of conformance passes on an endpoint that is right, and fails on an endpoint with the fault
that the case is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.conforming import Conforming, conforming
from support.endpoint import serve_reference

from k26_plugins.cli import app
from k26_plugins.operate.verify.conformance import CASES, FAIL, NOT_ASKED, PASS, check_conformance, counts
from k26_plugins.operate.verify.connect import connect
from k26_plugins.operate.verify.endpoint import Endpoint

BY_NAME = {case.name: case for case in CASES}


def outcome(endpoint: Conforming, name: str) -> tuple[str, str]:
    with conforming(endpoint) as url:
        (found,) = check_conformance(connect(url), cases=[BY_NAME[name]])
    return found.verdict, found.detail


def without(*names: str) -> Conforming:
    return Conforming(ignored=frozenset(names))


def spoilt(change: Any) -> Conforming:
    return Conforming(spoil=change)


def fails_with(status: int, name: str) -> Conforming:
    return Conforming(status=lambda body: status if body.get(name) else 200)


def first(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["choices"][0]
    return found


def miscount_streams(body: dict[str, Any], answer: dict[str, Any]) -> None:
    answer["usage"]["prompt_tokens"] += bool(body.get("stream"))


def lose_the_usage(body: dict[str, Any], answer: dict[str, Any]) -> None:
    if body.get("stream"):
        answer["usage"] = None


def lose_the_second_image(body: dict[str, Any], answer: dict[str, Any]) -> None:
    images = sum(part["type"] != "text" for part in body["messages"][0]["content"] if isinstance(part, dict))
    answer["usage"]["prompt_tokens"] -= 100 * (images > 1)


def call_anyway(body: dict[str, Any], answer: dict[str, Any]) -> None:
    first(answer)["message"]["tool_calls"] = [{"id": "functions.get_weather:0"}]


def stop_and_go_on(body: dict[str, Any], answer: dict[str, Any]) -> None:
    if "stop" in body:
        first(answer)["finish_reason"] = "length"


def unlikely(body: dict[str, Any], answer: dict[str, Any]) -> None:
    for entry in (first(answer).get("logprobs") or {"content": []})["content"]:
        entry["logprob"] = -3.0


def arguments_become(arguments: str) -> Conforming:
    def change(body: dict[str, Any], answer: dict[str, Any]) -> None:
        for call in first(answer)["message"].get("tool_calls") or []:
            call["function"]["arguments"] = arguments

    return spoilt(change)


def answer_becomes(content: str) -> Conforming:
    return spoilt(lambda body, answer: first(answer)["message"].update(content=content))


REFUSES = [name for name in BY_NAME if name.startswith("refuses ")]
IMAGES = [name for name in BY_NAME if name.startswith("image of ")]
# For each schema, arguments that break it.
BROKEN = {
    "nothing": "[]",
    "enum": '{"colour":"blue"}',
    "range": '{"level":11}',
    "nested": '{"points":[{"x":0,"y":1}]}',
    "defs": '{"at":{"x":4}}',
    "anyOf": '{"order":[12]}',
}
# The case, an endpoint with a fault, and what the result says.
FAULTS: list[tuple[str, Conforming, str]] = [
    ("thinking switched off", without("chat_template_kwargs", "thinking"), "changes the prompt"),
    ("usage of a stream", spoilt(miscount_streams), "the stream counts [27, 4]"),
    (
        "usage of a stream",
        spoilt(lambda body, answer: body.get("stream") and answer.update(usage=None)),
        "without its usage",
    ),
    *((name, Conforming(tokens=lambda size: max(size[0] * size[1] // 784, 1)), "expected") for name in IMAGES),
    (IMAGES[0], Conforming(tokens=lambda size: -9), "the image is not in the prompt"),
    ("three images", spoilt(lose_the_second_image), "images take 177 prompt tokens, expected 277"),
    *((name, Conforming(refuses=False), "must be refused") for name in REFUSES),
    (
        REFUSES[0],
        Conforming(status=lambda body: 500 if body.get("temperature", 1) < 0 else 200),
        "it must be refused, not",
    ),
    ("takes the usual values, thinking", fails_with(400, "top_p"), "answered 400"),
    ("takes the usual values, instant", fails_with(400, "top_p"), "answered 400"),
    ("n", without("n"), "1 choices, asked for 2"),
    ("n", fails_with(500, "n"), "answered 500"),
    (
        "temperature",
        Conforming(spoil=lambda body, answer: first(answer)["message"].update(content="one")),
        "are those at 0",
    ),
    ("top_p", without("top_p"), "the likeliest token is"),
    ("presence_penalty", fails_with(500, "presence_penalty"), "answered 500"),
    ("frequency_penalty", fails_with(500, "frequency_penalty"), "answered 500"),
    ("max_tokens", without("max_tokens"), "expected 5 and 'length'"),
    ("max_completion_tokens", without("max_completion_tokens"), "expected 5 and 'length'"),
    ("stop", without("stop"), "holds the stop string"),
    ("stop", spoilt(stop_and_go_on), "expected 'stop'"),
    ("seed", fails_with(500, "seed"), "answered 500"),
    ("logprobs", without("logprobs"), "0 entries for 4 tokens"),
    ("logprobs", spoilt(unlikely), "is not the likeliest"),
    ("response_format json_object", answer_becomes("Yes, it is."), "Expecting value"),
    ("response_format json_schema", answer_becomes('{"answer": "maybe"}'), "'maybe' is not one of"),
    ("tool_choice none", spoilt(call_anyway), "1 calls, and none was allowed"),
    *(
        (f"tool schema with {name}, {how}", arguments_become(arguments), "break their schema")
        for name, arguments in BROKEN.items()
        for how in ("whole", "streamed")
    ),
    ("tool schema with enum, whole", without("tool_choice"), "no call, and one is required"),
]


def test_what_is_right_holds() -> None:
    with conforming(Conforming()) as url:
        found = check_conformance(connect(url))
    assert {one.name: (one.verdict, one.detail) for one in found if one.verdict != PASS} == {}
    assert len(found) == len(BY_NAME)


@pytest.mark.parametrize(("name", "endpoint", "said"), FAULTS, ids=[f"{name}-{said}" for name, _, said in FAULTS])
def test_a_fault_is_found(name: str, endpoint: Conforming, said: str) -> None:
    verdict, detail = outcome(endpoint, name)
    assert verdict == FAIL, detail
    assert said in detail


def test_every_case_is_seen_to_fail() -> None:
    assert {name for name, _, _ in FAULTS} == set(BY_NAME)


def test_the_cases_are_part_of_a_verdict(tiny_folder: Path, golden_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of the reference refuses nothing, and the context that it reports is too short for an image."""
    monkeypatch.setattr(Endpoint, "context_length", lambda endpoint: counts.ROOM + 200)
    with serve_reference(tiny_folder, speak=lambda messages: "one two three") as url:
        command = ["verify", "--url", url, "--golden", str(golden_file), "--conformance"]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    assert "pass  image of 1000 × 100: 153 tokens" in result.output
    assert "FAIL  refuses top_p above one: it was taken, and must be refused" in result.output
    assert "not shown: image of 2560 × 1920: it needs 4,456 tokens, and the server's context is 456" in result.output


def test_a_case_is_not_decided_by_chance() -> None:
    """One seed may give two answers, a penalty may change nothing, and an answer may not end. The result then says so,
    and the case does not count against the server."""
    seeds = iter(range(1000))

    def another(body: dict[str, Any], answer: dict[str, Any]) -> None:
        if body.get("seed") == 7:
            first(answer)["message"]["content"] = f"answer {next(seeds)}"

    assert outcome(spoilt(another), "seed")[0] == NOT_ASKED
    assert outcome(without("presence_penalty"), "presence_penalty")[0] == NOT_ASKED

    def cut(body: dict[str, Any], answer: dict[str, Any]) -> None:
        first(answer)["finish_reason"] = "length"

    assert outcome(spoilt(cut), "response_format json_schema")[0] == NOT_ASKED
    assert outcome(spoilt(cut), "tool schema with enum, streamed")[0] == NOT_ASKED


FIXED_IN_MOONSHOTS_API = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize("name", FIXED_IN_MOONSHOTS_API)
def test_fixed_values_may_be_refused(name: str) -> None:
    usual = {
        "n": (1,),
        "temperature": (1.0, 0.6),
        "top_p": (0.95,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
    }

    def status(body: dict[str, Any]) -> int:
        return 200 if all(body.get(one, values[0]) in values for one, values in usual.items()) else 400

    verdict, detail = outcome(Conforming(status=status), name)
    assert (verdict, detail) == (PASS, "refused, as in Moonshot's API")
