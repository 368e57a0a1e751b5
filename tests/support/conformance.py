"""Runs `k26 verify`'s conformance cases against a server with random weights, whose tool calls are scripted.

A model with random weights never calls a tool by itself, so each request that requires a call is given a scripted
answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.scripted import call

from k26_plugins.common.prompt.output import SECTION_BEGIN, SECTION_END
from k26_plugins.operate.verify.conformance import CASES, FAIL, NOT_ASKED, check_conformance
from k26_plugins.operate.verify.connect import connect
from k26_plugins.operate.verify.endpoint import Endpoint

ARGUMENTS = {
    "use_nothing": "{}",
    "use_enum": '{"colour":"green"}',
    "use_range": '{"level":7}',
    "use_nested": '{"points":[{"x":0,"y":1},{"x":2,"y":3}]}',
    "use_defs": '{"at":{"x":4,"y":5}}',
    "use_anyOf": '{"order":12}',
}


# This case is left out: attention over 16,384 patches takes a CPU a minute, and the tests of media count the tokens of
# images that are shrunk.
SLOW = "image of 2560 × 1920"
UNDECIDED = {"seed", "response_format json_schema"}
"""The cases that random weights may leave undecided: their answers may be sampled in another order, and they may fill
JSON with blanks until the token limit."""


def holds_to_all(url: str) -> None:
    """Assert that the server, whose tool calls are scripted, fails no case, and leaves only those of UNDECIDED open."""
    found = check_conformance(connect(url), cases=[case for case in CASES if case.name != SLOW], max_tokens=160)
    assert [outcome for outcome in found if outcome.verdict == FAIL] == []
    assert {outcome.name for outcome in found if outcome.verdict == NOT_ASKED} <= UNDECIDED


def call_to_order(monkeypatch: pytest.MonkeyPatch, script: Callable[[str], dict[str, Any]]) -> None:
    """Have the server answer every request whose first tool is one of ARGUMENTS with a call of that tool.

    All other requests are answered by the model. script: returns the request fields that make the server give an
    answer.
    """

    def by_script(chat: Callable[..., Any]) -> Callable[..., Any]:
        def asked(endpoint: Endpoint, messages: list[dict[str, Any]], **body: Any) -> Any:
            name = body["tools"][0]["function"]["name"] if "tools" in body else ""
            if name in ARGUMENTS:
                answer = f"{SECTION_BEGIN}{call(f'functions.{name}:0', ARGUMENTS[name])}{SECTION_END}"
                body |= script(answer)
            return chat(endpoint, messages, **body)

        return asked

    for method in ("chat", "streamed_chat"):
        monkeypatch.setattr(Endpoint, method, by_script(getattr(Endpoint, method)))
